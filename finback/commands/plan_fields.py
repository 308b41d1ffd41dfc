"""What each kind of `finback plan` takes: the words of its command line, and their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from finback.planner.hardware import Precision
from finback.planner.layout import Recompute, ScheduleName
from finback.planner.serve import Tariff, Traffic

TrainingPrecision = Literal["fp32", "bf16", "fp8"]
"""int4 is a format of weights that are served; nothing trains in it."""
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
CEILINGS = Path("bench/results/ceilings.json")


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a plan is shown."""

    json: Flag = False
    """Print one JSON object instead of tables; units are in the field names, or beside them."""
    png: Path | None = None
    """Also write a picture to this file."""


@dataclass(frozen=True)
class ModelFields(Output):
    """What `finback plan model` takes."""

    model: Positional[str] = "v3-671b"
    """A preset's name, or a Hugging Face directory."""
    sequence_length: int | None = None
    """Tokens of a sequence, which attention's FLOPs depend on; None: 4096, or the model's most."""


@dataclass(frozen=True)
class TrainFields(Output):
    """What `finback plan train` takes. Parts of the layout that are left out are searched."""

    model: Positional[str] = "v3-671b"
    """A preset's name, or a Hugging Face directory."""
    hardware: str = "h800"
    """A row of `finback plan hardware`, or measured: this machine."""
    devices: int = 2048
    """Devices of the cluster."""
    tokens: float = 14.8e12
    """Tokens of the run."""
    sequence_length: int | None = None
    """Tokens of a sequence; None: 4096, or the model's most."""
    global_batch_size: int = 15360
    """Sequences of an optimizer step."""
    micro_batch_size: int = 1
    """Sequences of a micro-batch."""
    precision: TrainingPrecision | None = None
    """Of matrix products; None: fp8 where the hardware has it, else bf16."""
    pp: int | None = None
    """Pipeline stages; None: searched."""
    ep: int | None = None
    """Devices over which experts are spread; None: searched."""
    tp: int | None = 1
    """Devices that share each layer."""
    schedule: ScheduleName | None = None
    """Pipeline schedule; None: searched."""
    stage_layers: tuple[int, ...] | None = None
    """Decoder layers of each pipeline stage, as 4 4 4 3; None: as even in time as whole layers allow, the output head counted."""
    recompute: Recompute | None = None
    """What the backward computes again: none, selective (as V3) or full; None: searched."""
    expert_imbalance: float = 1.2
    """Load of the busiest device's experts over the mean; 1: forced to be even."""
    usd_per_device_hour: float | None = None
    """Rent; None: that of the hardware row, where it has one."""
    pue: float = 1.3
    """Energy of the building by energy of its machines."""
    kg_co2_per_kwh: float = 0.55
    """Of the grid."""
    ceilings: Path = CEILINGS
    """What make bench measured, for --hardware measured."""


@dataclass(frozen=True)
class RLFields(Output):
    """What `finback plan rl` takes."""

    model: Positional[str] = "v3-671b"
    """A preset's name, or a Hugging Face directory."""
    recipe: Literal["r1-zero", "r1"] = "r1-zero"
    """Steps, batch and lengths of that run; the fields below change them."""
    hardware: str = "h800"
    """A row of `finback plan hardware`, or measured."""
    devices: int = 512
    """Devices, which sample, score and train in turn."""
    pp: int = 16
    """Pipeline stages in training."""
    ep: int = 32
    """Devices over which experts are spread, in training and in a rollout unit."""
    recompute: Recompute | None = None
    """What the backward computes again: none, selective (as V3) or full; None: the least with which training fits."""
    steps: int | None = None
    """Optimizer steps; None: the recipe's."""
    batch_size: int | None = None
    """Samples of a step; None: the recipe's."""
    outputs_per_rollout: int | None = None
    """Samples of a rollout; None: the recipe's."""
    mean_tokens: float | None = None
    """Average length of a sample; None: the recipe's (assumed: it is not published)."""
    longest_tokens: float | None = None
    """Longest sample of a rollout; None: the recipe's."""
    mtp_acceptance: float = 0.0
    """Share of MTP's drafts that are accepted in sampling; 0: none are made."""
    precision: TrainingPrecision | None = None
    """None: fp8 where the hardware has it, else bf16."""
    usd_per_device_hour: float | None = None
    """Rent; None: that of the hardware row."""
    ceilings: Path = CEILINGS
    """What make bench measured, for --hardware measured."""


@dataclass(frozen=True)
class ServeFields(Output):
    """What `finback plan serve` takes; the defaults are DeepSeek's units and day of February 2025."""

    model: Positional[str] = "v3-671b"
    """A preset's name, or a Hugging Face directory."""
    hardware: str = "h800"
    """A row of `finback plan hardware`, or measured."""
    precision: Precision | None = None
    """Of weights; None: fp8 where the hardware has it, else bf16."""
    prefill_ep: int | None = None
    """Devices over which experts are spread in prefill; None: the fewest that hold the model, 32 where one node does not."""
    decode_ep: int | None = None
    """The same in decoding; None: the fewest, or 144."""
    tp: int = 1
    """Devices that share each layer; experts are not spread then."""
    redundant_experts: int | None = None
    """Copies of busy experts in both units; None: 32 in units of several nodes, else 0."""
    batch: int | None = None
    """Requests per decode device that the bill counts on; None: 88, or as many as fit."""
    mtp_acceptance: float = 0.0
    """Share of MTP's drafts that are accepted; 0: none are made."""
    input_tokens_per_day: float = Traffic.input_tokens_per_day
    """Input of a day, cache hits included."""
    output_tokens_per_day: float = Traffic.output_tokens_per_day
    """Output of a day."""
    hit_share: float = Traffic.hit_share
    """Share of input that is found in the cache."""
    prompt_tokens: float = Traffic.prompt_tokens
    """Average prompt."""
    context_tokens: float = Traffic.context_tokens
    """Average context of an output token."""
    usd_per_million_hit: float = Tariff.usd_per_million_hit
    """Price of cached input."""
    usd_per_million_miss: float = Tariff.usd_per_million_miss
    """Price of other input."""
    usd_per_million_output: float = Tariff.usd_per_million_output
    """Price of output."""
    usd_per_device_hour: float | None = None
    """Rent; None: that of the hardware row."""
    ceilings: Path = CEILINGS
    """What make bench measured, for --hardware measured."""


@dataclass(frozen=True)
class FitFields(Output):
    """What `finback plan fit` takes."""

    hardware: Positional[str] = "rtx4090"
    """A row of `finback plan hardware`, or measured."""
    context: int = 8192
    """Tokens of context that must fit."""
    ceilings: Path = CEILINGS
    """What make bench measured, for measured."""


@dataclass(frozen=True)
class ScheduleFields(Output):
    """What `finback plan schedule` takes."""

    name: Positional[str]
    """one_f_one_b, interleaved, zb1p, dualpipe or dualpipe_v."""
    stages: int = 8
    """Pipeline stages PP; DualPipeV has half as many ranks."""
    microbatches: int = 20
    """Micro-batches of a step."""
    chunks: int = 2
    """Stages of each rank, interleaved only."""
    forward: float = 1.0
    """Time of a forward."""
    backward_input: float = 1.0
    """Time of an input gradient."""
    backward_weight: float = 1.0
    """Time of a weight gradient; a full backward is both."""
    overlapped: float | None = None
    """Time of an overlapped pair; None: as long as its parts."""
    send: float = 0.0
    """Time between ranks."""


@dataclass(frozen=True)
class HardwareFields(Output):
    """What `finback plan hardware` takes."""


@dataclass(frozen=True)
class ValidateFields(Output):
    """What `finback plan validate` takes."""

    results: Path = Path("bench/results")
    """Directory of what make bench wrote."""
    out: Path | None = None
    """Also write the table as Markdown to this file."""


@dataclass(frozen=True)
class PageFields:
    """What `finback plan` takes without a kind."""

    html: Path
    """Write one self-contained page with controls, in Chinese and English, to this file."""
