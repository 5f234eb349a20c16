"""Checksums of the files of known data sets: algorithm and hexadecimal digest of the unpacked content.

They tell damage and mix-ups, not intent. MNIST and Fashion-MNIST: computed from files whose packed form has the md5 that the authors or
torchvision publish. CIFAR-10, binary version: as in MXNet's loader; python version: as in torchvision's; the two
repacked archives (npz): computed from the files that this project's benchmarks use.
"""

from __future__ import annotations

CHECKSUMS: dict[str, dict[str, tuple[str, str]]] = {
    "MNIST": {
        "train-images-idx3-ubyte": ("sha256", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        "train-labels-idx1-ubyte": ("sha256", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        "t10k-images-idx3-ubyte": ("sha256", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        "t10k-labels-idx1-ubyte": ("sha256", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    },
    "Fashion-MNIST": {
        "train-images-idx3-ubyte": ("sha256", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        "train-labels-idx1-ubyte": ("sha256", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        "t10k-images-idx3-ubyte": ("sha256", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        "t10k-labels-idx1-ubyte": ("sha256", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    },
    "CIFAR-10": {
        "data_batch_1.bin": ("sha1", "aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
        "data_batch_2.bin": ("sha1", "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
        "data_batch_3.bin": ("sha1", "1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
        "data_batch_4.bin": ("sha1", "aab85764eb3584312d3c7f65fd2fd016e36a258e"),
        "data_batch_5.bin": ("sha1", "26e2849e66a845b7f1e4614ae70f4889ae604628"),
        "test_batch.bin": ("sha1", "67eb016db431130d61cd03c7ad570b013799c88c"),
        "data_batch_1": ("md5", "c99cafc152244af753f735de768cd75f"),
        "data_batch_2": ("md5", "d4bba439e000b95fd0a9bffe97cbabec"),
        "data_batch_3": ("md5", "54ebc095f3ab1f0389bbae665268c751"),
        "data_batch_4": ("md5", "634d18415352ddfa80567beed471001a"),
        "data_batch_5": ("md5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        "test_batch": ("md5", "40351d587109b95175f43aff81a1287e"),
        "cifar10_jpegbytes.npz": ("sha256", "13861cc938344183e19107054c182fc06a04708cfbfeeaf896164384d12fd05d"),
        "cifar10_lossless_first4000.npz": (
            "sha256",
            "0836cfd52738e36989292d4899fac21bb548f3c8d09e948c8f19273ec3f4a8ae",
        ),
    },
}
