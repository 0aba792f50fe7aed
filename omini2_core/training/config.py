"""What a training run is told: the YAML file, checked as a whole before any model loads."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..errors import Omini2Error
from ..tokens.condition import (
    MAX_SCALE,
    MIN_SCALE,
    TOKEN_PIXELS,
    Placement,
)
from .base import DEMO, base_file

FIT = "fit"
MADE_ON_THE_FLY = ("canny", "grey", "blur", "mask", "resize")


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _list_of_sizes(value: Any) -> Any:
    # One size is a number or a pair, several are a list of lists: [[256, 256], [128, 128]].
    several = isinstance(value, list | tuple) and all(isinstance(v, list | tuple) for v in value)
    return value if several else (value,)


def _whole_tokens(size: tuple[int, int]) -> tuple[int, int]:
    if any(side < TOKEN_PIXELS or side % TOKEN_PIXELS for side in size):
        raise ValueError(f"sides have to be multiples of {TOKEN_PIXELS} pixels")
    return size


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"there is no {path}: check the path")
    return path


Size = Annotated[tuple[int, int], BeforeValidator(_pair), AfterValidator(_whole_tokens)]
Sizes = Annotated[
    tuple[Size, ...], BeforeValidator(_list_of_sizes), Field(min_length=1, max_length=8)
]
ExistingPath = Annotated[Path, AfterValidator(_existing)]
Probability = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Where the pictures come from: exactly one of ``folder``, ``datasets``, ``webdataset``."""

    folder: ExistingPath | None = None
    datasets: str | None = None
    webdataset: str | list[str] | None = None
    subset: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_column: str | None = None
    caption: str | None = None
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        given = [k for k in ("folder", "datasets", "webdataset") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"name exactly one of folder, datasets and webdataset, not {len(given)}"
            )
        return self


class ConditionConfig(_Section):
    """One condition and how it is trained; each gets a LoRA file of its own."""

    type: Literal["canny", "grey", "blur", "mask", "resize", "folder", "column"]
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    folder: ExistingPath | None = None
    column: str | None = None
    condition_size: Sizes | None = None
    position_delta: tuple[float, float] = (0.0, 0.0)
    position_scale: Literal["fit"] | Annotated[float, Field(ge=MIN_SCALE, le=MAX_SCALE)] = "fit"
    independent_condition: bool = False
    main_lora: bool = False
    pruning: bool = False
    threshold: Probability = 0.1
    grow: int = Field(default=0, ge=0, le=64)
    integration: bool = False
    masks: ExistingPath | None = None
    low_threshold: float = Field(default=0.4, ge=0.01, le=0.99)
    high_threshold: float = Field(default=0.8, ge=0.01, le=0.99)
    blur_radius: tuple[float, float] = (1.0, 10.0)
    variants: int = Field(default=1, ge=1, le=1000)
    fade_steps: int = Field(default=0, ge=0)
    init_lora: ExistingPath | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ConditionConfig":
        wrong = []
        for kind in ("folder", "column"):
            if (getattr(self, kind) is not None) != (self.type == kind):
                wrong.append(f"{kind} goes with type: {kind}, and that type needs it")
        if self.integration and self.type != "resize":
            wrong.append("integration conditions on the picture itself: set type to resize")
        if self.integration and (self.pruning or self.position_delta != (0.0, 0.0)):
            wrong.append("integration goes without pruning and position_delta: leave both out")
        if self.fade_steps and (
            self.integration or self.pruning or self.position_delta != (0.0, 0.0)
        ):
            wrong.append(
                "fade_steps begins with the picture itself, token by token: leave out integration, "
                "pruning and position_delta"
            )
        if self.masks is not None and not self.integration:
            wrong.append("masks say what integration paints: set integration to true")
        if self.low_threshold > self.high_threshold:
            wrong.append("low_threshold is above high_threshold: lower it")
        if not 0 < self.blur_radius[0] <= self.blur_radius[1]:
            wrong.append("blur_radius takes the smallest and the largest radius, above 0")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def label(self) -> str:
        """What the condition, its file and its metadata are called."""
        if self.name:
            return self.name
        if self.integration:
            return "integration"
        return self.folder.name if self.folder is not None else self.column or self.type


class OptimizerConfig(_Section):
    """Prodigy finds its own learning rate (lr stays 1); AdamW wants one, 1e-4 unless given."""

    type: Literal["prodigy", "adamw"] = "prodigy"
    lr: float | None = Field(default=None, gt=0)
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)

    @property
    def learning_rate(self) -> float:
        """The learning rate after warm-up."""
        return self.lr or {"prodigy": 1.0, "adamw": 1e-4}[self.type]


class SampleConfig(_Section):
    """Pictures drawn while training, next to their conditions and targets."""

    every: int = Field(default=0, ge=0)
    count: int = Field(default=4, ge=1, le=64)
    steps: int = Field(default=20, ge=1, le=1000)
    guidance: float = Field(default=3.5, ge=0)


class EncoderConfig(_Section):
    """Text encoders and VAE: single files through ComfyUI's loaders, or a diffusers folder."""

    clip_l: ExistingPath | None = None
    t5xxl: ExistingPath | None = None
    vae: ExistingPath | None = None
    diffusers: ExistingPath | None = None
    comfyui: ExistingPath | None = None

    @model_validator(mode="after")
    def _complete(self) -> "EncoderConfig":
        files = [k for k in ("clip_l", "t5xxl", "vae") if getattr(self, k) is None]
        if self.diffusers is None and files:
            raise ValueError(
                f"give clip_l, t5xxl and vae, or diffusers: {', '.join(files)} missing"
            )
        if self.diffusers is not None and len(files) < 3:
            raise ValueError("give either clip_l, t5xxl and vae, or diffusers, not both")
        return self


class TrainConfig(_Section):
    """One run of the trainer; ``docs/training.md`` explains every key."""

    base: str
    output: Path
    target_size: Size = (512, 512)
    data: DataConfig
    encoders: EncoderConfig | None = None
    references: Literal["off", "joint", "isolated"] = "off"
    conditions: list[ConditionConfig] = Field(min_length=1, max_length=16)
    rank: int = Field(default=4, ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0)
    target_modules: Literal["full", "small"] = "full"
    steps: int = Field(default=10000, ge=1)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = True
    mixed_precision: Literal["no", "bf16"] = "bf16"
    quantize: Literal["none", "nf4", "int8"] = "none"
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    max_grad_norm: float = Field(default=0.5, gt=0)
    time_shift: float = Field(default=1.0, gt=0)
    drop_text_prob: Probability = 0.1
    drop_image_prob: Probability = 0.1
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    resume: bool = True
    samples: SampleConfig = Field(default_factory=lambda: SampleConfig())
    cache: Path | None = None
    threads: int | None = Field(default=None, ge=1)

    @field_validator("base")
    @classmethod
    def _base_exists(cls, base: str) -> str:
        if not base_file(base).exists():
            raise ValueError(f"there is no {base}; name a file, a folder or {DEMO}")
        return base

    @field_validator("conditions")
    @classmethod
    def _conditions_fit(
        cls, conditions: list[ConditionConfig], info: ValidationInfo
    ) -> list[ConditionConfig]:
        wrong = []
        labels = [c.label for c in conditions]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            wrong.append(f"two are called {twice[0]}; give each a name")
        if sum(c.integration for c in conditions) > 1:
            wrong.append("a picture can have only one with integration: join their masks")
        if sum(c.main_lora for c in conditions) > 1:
            wrong.append("only one condition's LoRA can be the picture's: leave out main_lora")
        target = info.data.get("target_size")
        if any(c.integration and c.condition_size not in (None, (target,)) for c in conditions):
            wrong.append("integration needs condition_size to be the target_size; leave it out")
        if any(c.fade_steps and c.condition_size not in (None, (target,)) for c in conditions):
            wrong.append("fade_steps needs condition_size to be the target_size; leave it out")
        data = info.data.get("data")
        if data is not None and data.folder is not None and any(c.column for c in conditions):
            wrong.append("type: column is for datasets and webdataset; use type: folder")
        if info.data.get("references", "off") != "off":
            wrong += _wrong_for_references(conditions)
        if wrong:
            raise ValueError("; ".join(wrong))
        return conditions

    @model_validator(mode="after")
    def _edits_change_all_layers(self) -> "TrainConfig":
        if self.references != "off" and self.target_modules == "small":
            raise ValueError(
                "target_modules: small is for conditions, edits need all layers: leave it out, or "
                "set references to off"
            )
        return self

    @property
    def lora_alpha(self) -> float:
        """The LoRA's alpha, which is the rank unless given."""
        return self.alpha if self.alpha is not None else float(self.rank)

    @property
    def cache_folder(self) -> Path:
        """Where latents and text features are cached."""
        return (self.cache or self.output / "cache").expanduser()

    def condition_sizes(self, index: int) -> tuple[tuple[int, int], ...]:
        """Widths and heights of a condition in pixels; each step draws one of them."""
        return self.conditions[index].condition_size or (self.target_size,)

    def placement(self, index: int, size: tuple[int, int]) -> Placement:
        """Where the tokens of a condition of this size lie; ``fit`` worked out."""
        condition = self.conditions[index]
        scale: tuple[float, float]
        if self.references != "off":
            scale = 1.0, 1.0  # where a stock editing model has them
        elif condition.position_scale == FIT:
            (width, height), (w, h) = self.target_size, size
            scale = height / h, width / w
        else:
            scale = (float(condition.position_scale),) * 2
        return Placement("custom", condition.position_delta, scale)


# What is said of conditions only: references lie where the editing model puts them, and one LoRA
# acts on all that there is.
NOT_FOR_REFERENCES = (
    "position_delta", "position_scale", "independent_condition", "main_lora", "pruning",
    "integration", "fade_steps",
)  # fmt: skip


def _wrong_for_references(conditions: list[ConditionConfig]) -> list[str]:
    wrong = []
    for key in NOT_FOR_REFERENCES:
        default = ConditionConfig.model_fields[key].default
        if any(getattr(condition, key) != default for condition in conditions):
            wrong.append(f"{key} is for conditions: leave it out, or set references to off")
    if any(condition.init_lora is not None for condition in conditions[1:]):
        wrong.append("all references share one LoRA: give init_lora to the first of them")
    return wrong


def load_config(path: Path) -> TrainConfig:
    """Reads and checks a YAML file.

    Raises:
        Omini2Error: not there, no YAML, or wrong values; all of them at once.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Omini2Error(f"{path} can't be read as a YAML file: {error}") from error
    return parse_config(values, str(path))


def parse_config(values: Any, name: str = "config") -> TrainConfig:
    """Checks a config given as a mapping.

    Raises:
        Omini2Error: one line for each key that is wrong, with what it may be.
    """
    if not isinstance(values, dict):
        raise Omini2Error(f"{name} is no list of keys and values; start from an example config.")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = [_line(problem) for problem in error.errors(include_url=False)]
        raise Omini2Error("\n".join([f"{name} can't be used:", *lines])) from error


def _line(problem: Any) -> str:
    # Which member of a union was tried ("float", "literal['fit']") means nothing to a user.
    path = [p for p in problem["loc"] if not (isinstance(p, str) and re.search(r"[\[\]()-]", p))]
    if len(path) > 1 and path[-1] in ("float", "str"):
        path.pop()
    key = ".".join(str(p) for p in path) or "config"
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(problem["loc"])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
        return f"  {key}: there is no such key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r:.80})"
    return f"  {key}: {message[0].lower()}{message[1:]}{given}"


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    sections = {
        "data": DataConfig,
        "encoders": EncoderConfig,
        "conditions": ConditionConfig,
        "optimizer": OptimizerConfig,
        "samples": SampleConfig,
    }
    model: Any = sections[location[0]] if len(location) > 1 else TrainConfig
    return list(model.model_fields)
