"""gptqmodel's half of `bench.gptq_peer`: run by the interpreter of gptqmodel's own environment, without finback."""

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main(mode: str, work: Path) -> None:
    """Read what `bench.gptq_peer` left in `work`, and leave the answer there."""
    request = json.loads((work / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    answer = {"quantise": quantise, "generate": generate}[mode](work, request)
    from importlib.metadata import version

    answer["versions"] = {name: version(name) for name in ("gptqmodel", "torch", "transformers", "optimum")}
    (work / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def quantise(work: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Every matrix by every setting, as its `GPTQ` leaves it: the values of the quantised weight before scales become float16."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    inputs, weights = load_file(work / "inputs.safetensors"), load_file(work / "weights.safetensors")
    results, start = dict[str, torch.Tensor](), perf_counter()
    for number, setting in enumerate(request["settings"]):
        for name, weight in weights.items():
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.clone()
            config = QuantizeConfig(
                bits=setting["bits"],
                group_size=setting["group_size"],
                sym=setting["sym"],
                desc_act=setting["order"] == "activation",
                act_group_aware=setting["order"] == "activation within groups",
                damp_percent=request["damping"],
                fallback=None,
            )
            task = GPTQ(layer, config)
            task.quantizer.configure(perchannel=True)
            task.add_batch(inputs[request["inputs"][name]], torch.empty(0))
            approximation, *_, damping, _ = task.quantize()
            assert damping == request["damping"], "it has raised its damping"
            results[f"{number}/{name}"] = approximation.detach().float().contiguous()
            task.free()
    seconds = perf_counter() - start
    save_file(results, work / "results.safetensors")
    return {"seconds": seconds}


def generate(work: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens behind each prompt, by transformers with gptqmodel's layers, and the logits of the first prompt."""
    torch.compiler.set_stance("force_eager")  # nothing is timed, so nothing need be compiled
    from transformers import AutoModelForCausalLM, GPTQConfig

    stored = json.loads((Path(request["model"]) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    plain = GPTQConfig(bits=stored["bits"], backend="gptq_torch")  # in torch: others round to bfloat16, and are compiled first
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, device_map="cpu", quantization_config=plain
    ).eval()
    layers = {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
    tokens = []
    with torch.no_grad():
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt])
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request["new_tokens"], eos_token_id=None
            )
            tokens.append(output[0, len(prompt) :].tolist())
        logits = model(torch.tensor([request["prompts"][0]])).logits[0].float()
    save_file({"logits": logits.contiguous()}, work / "logits.safetensors")
    return {"tokens": tokens, "layers": sorted(layers)}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
