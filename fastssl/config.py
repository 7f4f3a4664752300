"""Config: every setting of a run that does not depend on its method, with unit and source.

A method's knobs are defined beside its class in `objectives/` and stored in `Config.objective`; the
command line derives its flags from both. Both are frozen, so `config.json` is what the run used.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Knobs:
    """Base class of the knobs of a method. A plain `Knobs()` stands for the method's defaults."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a vision backbone without labels, then evaluate its features."""

    # data
    data: str = ""
    """'digits', 'cifar10' (downloaded), an .npz with x_train [y_train x_test y_test], a folder of
    images or of class folders (with train/ and val/ or test/ or without), tar shards (or a folder
    of them; no labels), or CIFAR-10's python batches."""
    engine: Literal["auto", "resident", "dali", "ffcv"] = "resident"
    """What decodes and renders the views: 'resident' holds the images in memory at load_size;
    'dali' and 'ffcv' stream a folder's or shards' JPEGs; 'auto' chooses and logs why."""
    render: Literal["fastssl", "dali"] = "fastssl"
    """Engine dali: what renders the views; DALI's operators approximate, and log how."""
    scaled: bool = True
    """Engines dali (on a CPU) and ffcv: decode JPEGs at 1/2, 1/4 or 1/8 where that suffices.
    """
    oriented: bool = False
    """Apply the EXIF orientation of images in a folder or in shards, in training and evaluation;
    torchvision ignores it."""
    on_corrupt: Literal["skip", "stop"] = "skip"
    """On an unreadable image: log its name and skip it, or stop the run."""
    corrupt_quota: float = 0.01
    """Fraction of unreadable images above which a run with --on-corrupt skip stops."""
    load_size: int = 256
    """Side, in px, of the square to which images of a folder are resized and cropped on loading."""
    train_images: int = 0
    """Number of images of the training part to use, the first ones, for training and as the
    labelled ones of the evaluation; 0: all."""
    holdout: float = 0.2
    """Fraction of the images held out for evaluation, where the data has no test part."""

    # method
    method: str = "barlow"
    """The self-supervised objective; `fastssl methods` lists them with paper and formula."""
    objective: Knobs = Knobs()
    """The knobs of that method."""
    policy: str = "simclr"
    """Augmentation policy, by its name in fastssl_pipelines.policies."""
    views: int = 2
    """Views of each image in a batch; for EMP-SSL its patches, 20 to 200 in the paper."""
    image_size: int = 224
    """Side of a view, in px."""

    # network
    backbone: str = "resnet50"
    """'fastnet', 'fastnet-64', ... (a small net for CPUs) or any timm model name, without a tag of
    pretrained weights."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """'cifar' replaces a ResNet's first layers by one 3x3 convolution, for images of 32 px."""

    # optimisation
    batch_size: int = 256
    """Images in a batch, of each rank; the last incomplete batch of an epoch is dropped."""
    global_batch: int = 0
    """Images in a batch over all ranks of a torchrun launch, in place of `batch_size`; 0: unset."""
    accumulate: int = 1
    """Parts into which the backbone splits a batch, to save memory: activations are recomputed in
    the backward pass. Exact for every loss; batch norm sees one part at a time."""
    epochs: int = 100
    """Passes over the data."""
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    """The update rule; SGD and LARS use `momentum`."""
    lr: float = 1e-3
    """Peak learning rate; not scaled with the batch size."""
    weight_decay: float = 0.05
    """Decay of weights; biases, gains, tokens and tables of positions are exempt."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    nesterov: bool = False
    """Nesterov momentum for SGD and LARS; EMP-SSL uses it (arXiv:2304.03977)."""
    lars_eta: float = 1e-3
    """Trust coefficient of LARS (arXiv:1708.03888); Barlow Twins and VICReg 0.001, EMP-SSL 0.005,
    solo-learn on CIFAR 0.02."""
    lars_clip: bool = False
    """LARS never takes a larger step than SGD would (LARC); EMP-SSL uses it."""
    bias_lr: float = 1.0
    """Learning rate of biases and normalisation layers as a fraction of `lr`; Barlow Twins' code
    uses 0.024 (0.0048 / 0.2)."""
    warmup_epochs: float = 10.0
    """Linear warm-up from 0."""
    final_lr: float = 1e-3
    """Learning rate at the end of the cosine, as a fraction of `lr`."""
    time_budget_s: float = 0.0
    """Seconds of training that the schedule covers, in place of `epochs`; 0: unset."""
    target_accuracy: float = 0.0
    """Stop when the online probe reaches it; 0: unset. Only the probe reads labels."""
    ramp_epochs: int = 0
    """Epochs over which views grow from `start_size` and `start_views` to the full ones."""
    start_size: int = 0
    """Side of a view in the first epoch of a ramp, in px; 0: `image_size`."""
    start_views: int = 0
    """Views of each image in the first epoch of a ramp; 0: `views`."""

    # execution
    seed: int = 0
    """Seed of the initial weights, the order of images and the views."""
    device: str = "auto"
    """'auto' takes the GPU where there is one; else any torch device."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast; losses accumulate in float32 either way."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on GPUs and on CPUs."""
    compile: bool = False
    """torch.compile the network and the objective; a failure is logged and the run continues
    without."""
    cuda_graphs: bool = False
    """Compile with CUDA graphs (torch.compile's "reduce-overhead"), where shapes are fixed; needs
    `compile`."""
    sync_batchnorm: bool = False
    """Batch norm statistics over all ranks, as in one process with the whole batch."""
    init: str = ""
    """Weights to start the backbone from: a file (.safetensors, .pth) of fastssl, timm or
    torchvision, a run folder, 'imagenet', or a model on the hub ('resnet18.a1_in1k', 'hf-hub:...').
    """
    init_partial: bool = False
    """Accept an `init` file that fills only some of the backbone's tensors."""

    # reports
    run: str = ""
    """Run folder; by default runs/RECIPE, or runs/RECIPE-2, ... where that is taken."""
    log_every: int = 20
    """Steps between two reports of the metrics, each a sync with the device."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient: stop the run or skip the step; weights stay finite."""
    stall_s: float = 10.0
    """Log phase and stack of a step that takes over twice its usual time, and over this."""
    probe_epochs: int = 0
    """Epochs between two online kNN probes of the backbone, whose time is not counted; 0: none."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints; more where saving would take over 2 % of the time."""
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    """On features that collapse to a point or a few directions: warn with likely causes, stop the
    run, or ignore it."""
    knn_k: int = 20
    """Neighbours of the kNN classifier."""
    knn_temperature: float = 0.07
    """Temperature of its weights exp(cosine / temperature)."""
    label_draws: int = 10
    """Random samples of 1, 5 and 10 labels per class, over which accuracies are averaged."""

    def __post_init__(self) -> None:
        positive = ("load_size", "views", "image_size", "batch_size", "epochs")
        for name in (*positive, "accumulate", "log_every", "knn_k", "label_draws"):
            require(self, name, getattr(self, name) >= 1, "be at least 1")
        require(self, "holdout", 0 < self.holdout < 1, "lie between 0 and 1")
        if self.render == "dali" and self.engine != "dali":
            raise ValueError(f"--render dali needs --engine dali, not {self.engine}")
        beton = self.engine == "auto" and self.data.endswith(".beton")
        if self.oriented and (self.engine == "ffcv" or beton):
            raise ValueError("--oriented: engine ffcv ignores EXIF orientation; use --engine dali")
        require(self, "corrupt_quota", 0 <= self.corrupt_quota <= 1, "lie in [0, 1]")
        for name in ("global_batch", "time_budget_s", "ramp_epochs", "probe_epochs"):
            require(self, name, getattr(self, name) >= 0, "not be negative")
        if not 0 <= self.target_accuracy <= 1:
            raise ValueError(
                f"--target-accuracy is {self.target_accuracy}: pass a fraction, such as 0.8"
            )
        if self.target_accuracy and not self.probe_epochs:
            raise ValueError("--target-accuracy needs --probe-epochs, such as 1")
        if (self.start_size or self.start_views) and not self.ramp_epochs:
            raise ValueError("--start-size and --start-views need --ramp-epochs")
        if not 0 <= self.start_size <= self.image_size:
            raise ValueError(f"--start-size is {self.start_size}: it must not exceed --image-size")
        if not 0 <= self.start_views <= self.views:
            raise ValueError(f"--start-views is {self.start_views}: it must not exceed --views")
        if self.compile and self.accumulate > 1:
            raise ValueError("--accumulate cannot be compiled; add --no-compile")
        if self.cuda_graphs and not self.compile:
            raise ValueError("--cuda-graphs needs --compile")
        for name in ("stall_s", "lr", "lars_eta", "bias_lr"):
            require(self, name, getattr(self, name) > 0, "be positive")
        require(self, "train_images", self.train_images >= 0, "be 0 (all) or more")
        require(self, "momentum", 0 <= self.momentum < 1, "lie in [0, 1)")
        if self.nesterov and self.momentum == 0:
            raise ValueError("--nesterov needs --momentum above 0")
        if self.batch_size < 2:
            raise ValueError(
                "--batch-size is 1: batch statistics and every loss need at least 2 images"
            )


def flag(name: str) -> str:
    """The command-line flag of a knob: "image_size" -> "--image-size"."""
    return f"--{name.replace('_', '-')}"


def require(knobs: Any, name: str, valid: bool, must: str) -> None:
    """ValueError "--name is VALUE: it must ..." unless `valid`."""
    if not valid:
        raise ValueError(f"{flag(name)} is {getattr(knobs, name)}: it must {must}")


def knob_names(cls: type) -> set[str]:
    """The fields of `Config` or of a method's `Knobs` that are flags of the command line."""
    return {field.name for field in fields(cls)} - {"objective"}
