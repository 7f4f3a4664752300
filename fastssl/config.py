"""Config: every setting of a run that does not depend on its method, with unit and source.

A method's own knobs stand beside its class in `objectives/` and are `Config.objective`; the command
line derives its flags from both. All of it is frozen: what a run's `config.json` says is what the
run did.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Knobs:
    """The knobs of one method, in its own file. An instance of this class itself stands for the
    method's defaults."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a vision backbone without labels, then measure how good its features are."""

    # data
    data: str = ""
    """'digits', 'cifar10' (downloaded), an .npz with x_train [y_train x_test y_test], a folder of
    images or of class folders (with train/ and val/ or test/ or without), tar shards (or a folder
    of them; no labels), or CIFAR-10's python batches."""
    engine: Literal["auto", "resident", "dali", "ffcv"] = "resident"
    """What decodes and renders the views: 'resident' holds the images in memory at load_size;
    'dali' and 'ffcv' decode a folder's or shards' JPEGs as they go; 'auto' chooses and says why."""
    render: Literal["fastssl", "dali"] = "fastssl"
    """Engine dali: who makes the views; DALI's own operators approximate, and say how."""
    scaled: bool = True
    """Engines dali (on a CPU) and ffcv: decode JPEGs at 1/2, 1/4 or 1/8 where views need no more.
    """
    oriented: bool = False
    """Turn the images of a folder or of shards as their EXIF tag says, in training and evaluation;
    torchvision ignores it."""
    on_corrupt: Literal["skip", "stop"] = "skip"
    """What an unreadable image does: it is named and left out, or it ends the run."""
    corrupt_quota: float = 0.01
    """Share of the images that may be unreadable before a run with --on-corrupt skip stops."""
    load_size: int = 256
    """Side of the square, in px, to which images of a folder are resized and cropped when they are
    loaded."""
    train_images: int = 0
    """Use only the first so many images of the training part, for training and as the labelled ones
    of the evaluation; 0 uses all."""
    holdout: float = 0.2
    """Share of the images kept out of pretraining for evaluation, where the data has no test part
    of its own."""

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
    """'fastnet', 'fastnet-64', ... (a small net for CPUs) or any timm model name."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """'cifar' turns a ResNet's first layers into one 3x3 convolution, for images of 32 px."""

    # optimisation
    batch_size: int = 256
    """Images in a batch, of each rank; the last incomplete batch of an epoch is dropped."""
    global_batch: int = 0
    """Images in a batch over all ranks of a torchrun launch, in place of `batch_size`; 0: unset."""
    accumulate: int = 1
    """Parts in which the backbone passes a batch, to save memory: each part's activations are
    computed again in the backward pass. Exact for every loss; batch norm sees one part at a time.
    """
    epochs: int = 100
    """Passes over the data."""
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    """The update rule; SGD and LARS use `momentum`."""
    lr: float = 1e-3
    """Peak learning rate, as it is: no scaling with the batch size."""
    weight_decay: float = 0.05
    """Decay of weights; biases and normalisation layers are exempt."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    nesterov: bool = False
    """Nesterov momentum for SGD and LARS; EMP-SSL has it (arXiv:2304.03977)."""
    lars_eta: float = 1e-3
    """Trust coefficient of LARS (arXiv:1708.03888); Barlow Twins and VICReg 0.001, EMP-SSL 0.005,
    solo-learn on CIFAR 0.02."""
    lars_clip: bool = False
    """LARS never takes a larger step than SGD would (LARC); EMP-SSL has it."""
    bias_lr: float = 1.0
    """Learning rate of biases and normalisation layers as a share of `lr`; Barlow Twins' code has
    0.024 (0.0048 / 0.2)."""
    warmup_epochs: float = 10.0
    """Linear warm-up from 0."""
    final_lr: float = 1e-3
    """Learning rate at the end of the cosine, as a share of `lr`."""
    time_budget_s: float = 0.0
    """Seconds of training in which the schedule runs to its end, in place of `epochs`; 0: unset."""
    target_accuracy: float = 0.0
    """Stop when the online probe reaches it; 0: unset. Labels are read for the probe alone."""
    ramp_epochs: int = 0
    """Epochs over which views grow from `start_size` and `start_views` to their own."""
    start_size: int = 0
    """Side of a view in the first epoch of a ramp, in px; 0: `image_size`."""
    start_views: int = 0
    """Views of each image in the first epoch of a ramp; 0: `views`."""

    # execution
    seed: int = 0
    """Of the initial weights, of the order of images and of the views."""
    device: str = "auto"
    """'auto' takes the GPU where there is one; else any torch device."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast; losses accumulate in float32 either way."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on GPUs and on CPUs."""
    compile: bool = False
    """torch.compile the network and the objective; where that fails the run says so and goes on
    without."""
    cuda_graphs: bool = False
    """Compile with CUDA graphs (torch.compile's "reduce-overhead"), where shapes are fixed; needs
    `compile`."""
    sync_batchnorm: bool = False
    """Batch norm over all ranks' rows, so that W ranks take the step of one with the whole batch.
    """
    init: str = ""
    """A backbone.safetensors whose weights the backbone starts from."""
    init_partial: bool = False
    """Accept an `init` file that fills only some of the backbone's tensors."""

    # reports
    run: str = ""
    """Run folder; by default runs/RECIPE, with a number behind it where that one is taken."""
    log_every: int = 20
    """Steps between two readings of the metrics, the only syncs with the device."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does; it never reaches the weights."""
    stall_s: float = 10.0
    """A step over twice the usual time, and over this, prints its phase and stack."""
    probe_epochs: int = 0
    """Epochs between two online kNN probes of the backbone, whose time is not counted; 0: none."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints; more where saving would take over 2 % of the time."""
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    """What features that collapse to a point or a few directions do: warn with likely causes, end
    the run, or nothing."""
    knn_k: int = 20
    """Neighbours of the kNN classifier."""
    knn_temperature: float = 0.07
    """Temperature of its weights exp(cosine / temperature)."""
    label_draws: int = 10
    """Random draws of 1, 5 and 10 labels per class that low-label accuracies are averaged over."""

    def __post_init__(self) -> None:
        positive = ("load_size", "views", "image_size", "batch_size", "epochs")
        for name in (*positive, "accumulate", "log_every", "knn_k", "label_draws"):
            require(self, name, getattr(self, name) >= 1, "be at least 1")
        require(self, "holdout", 0 < self.holdout < 1, "lie between 0 and 1")
        if self.render == "dali" and self.engine != "dali":
            raise ValueError(f"--render dali needs --engine dali, and it is {self.engine}")
        beton = self.engine == "auto" and self.data.endswith(".beton")
        if self.oriented and (self.engine == "ffcv" or beton):
            raise ValueError("--oriented: engine ffcv cannot turn images; use --engine dali")
        require(self, "corrupt_quota", 0 <= self.corrupt_quota <= 1, "lie in [0, 1]")
        for name in ("global_batch", "time_budget_s", "ramp_epochs", "probe_epochs"):
            require(self, name, getattr(self, name) >= 0, "not be negative")
        if not 0 <= self.target_accuracy <= 1:
            raise ValueError(
                f"--target-accuracy is {self.target_accuracy}: give a share, such as 0.8"
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
    """The command line's name of a knob: "image_size" -> "--image-size"."""
    return f"--{name.replace('_', '-')}"


def require(knobs: Any, name: str, valid: bool, must: str) -> None:
    """ValueError "--name is VALUE: it must ..." unless `valid`."""
    if not valid:
        raise ValueError(f"{flag(name)} is {getattr(knobs, name)}: it must {must}")


def knob_names(cls: type) -> set[str]:
    """The fields of `Config` or of a method's `Knobs` that are flags of the command line."""
    return {field.name for field in fields(cls)} - {"objective"}
