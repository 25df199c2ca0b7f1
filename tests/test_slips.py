"""Slips of a user, over all verbs and settings: each is one sentence that says what is wrong, and nothing comes of it."""

import dataclasses
import os
import re
import shlex
import tempfile
import typing
from pathlib import Path

import pytest
from jobs import run_each
from slips import STAND_INS, make_home, make_odd

from accessory.settings import RunConfig

# A number of a run file: what it can be, in the words of the sentence, and a value that it cannot be.
LIMITS = {
    "model.offload.experts": ("at least 1", 0),
    "data.max_seq_len": ("at least 1", 0),
    "data.validation": ("at least 0 and below 1", 1),
    "parallel.model_parallel": ("at least 1", 0),
    "parallel.shard_size": ("at least 1", 0),
    "parallel.stall_timeout_s": ("above 0", 0),
    "tuning.lora.rank": ("at least 1", 0),
    "tuning.lora.alpha": ("above 0", 0),
    "tuning.lora.dropout": ("at least 0 and below 1", 1),
    "optim.lr": ("above 0", 0),
    "optim.min_lr": ("at least 0", -1),
    "optim.warmup_epochs": ("at least 0", -1),
    "optim.weight_decay": ("at least 0", -5),
    "optim.betas": ("at least 0 and below 1", [0.9, 1]),
    "optim.eps": ("above 0", -1e-8),
    "optim.clip_grad": ("above 0", 0),
    "train.epochs": ("at least 1 and below 100,000", 0),
    "train.max_steps": ("at least 1", 0),
    "train.batch_size": ("at least 1", -4),
    "train.accumulation": ("at least 1 and below 100,000", 1_000_000_000_000),
    "train.balance_weight": ("at least 0", -1),
    "train.bias_rate": ("at least 0", -1),
    "train.z_loss_weight": ("at least 0", -1),
    "train.seed": ("at least 0 and below 9,223,372,036,854,775,808", 10**24),
    "log.every": ("at least 1", 0),
    "log.validate_every": ("at least 1", 0),
    "log.probe_tokens": ("at least 0", -1),
    "log.alarms.load_min": ("at least 0 and at most 1", 5),
    "log.alarms.load_max": ("at least 1", 0.5),
    "log.alarms.entropy_share": ("at least 0 and at most 1", 1.5),
    "log.alarms.routing_change": ("at least 0 and at most 1", -0.1),
    "save.every_epochs": ("at least 1", 0),
    "save.state_every": ("at least 1", 0),
    "save.keep_states": ("at least 1", 0),
    "save.keep_every": ("at least 1", 0),
}


def numbers(section, prefix=""):
    """{key: int or float} of every number among the settings of a section."""
    found = {}
    for name, hint in typing.get_type_hints(section).items():
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                found |= numbers(option, f"{prefix}{name}.")
            elif option in (int, float):
                found[prefix + name] = option
    return found


NUMBERS = numbers(RunConfig)


def test_the_table_has_every_number():
    assert NUMBERS.keys() == LIMITS.keys()


def settings():
    """Of every number: a value that it cannot be, not-a-number, a word, and a list (of a list of numbers, a word in it)."""
    for key, (limits, bad) in LIMITS.items():
        kind = NUMBERS[key].__name__
        shown = bad[-1] if isinstance(bad, list) else bad
        yield f"'{key}={bad}'", f"run.yaml: {key} must be {limits}, found {float(shown) if kind == 'float' else shown}"
        if kind == "int":
            yield f"{key}=.nan", f"run.yaml: {key}: expected int"
        else:
            value = "[.nan,0.9]" if key == "optim.betas" else ".nan"
            yield f"{key}={value}", f"run.yaml: {key} must be a finite number {limits}, found nan"
        yield f"{key}=many", f"run.yaml: {key}: expected {'list' if key == 'optim.betas' else kind}"
        yield f"{key}=[[1]]", f"run.yaml: {key}: expected {'2 values, found 1' if key == 'optim.betas' else kind}"


CHECKPOINT = "model.checkpoint={home}/ckpt model.config=null model.tokenizer=null"
RUNS = {  # changes of the good run file: the sentence
    "optim.lr=": "'optim.lr=': there is no value; is a variable not set?",
    "optim.lr=null": "run.yaml: optim.lr: expected float, found None",
    "optim.lr=2020-99-99": "'optim.lr=2020-99-99': not a YAML value: month must be in 1..12",
    "optim.lr=2020-01-01": "run.yaml: optim.lr: expected float",
    "optim.lr=1" + "0" * 400: "run.yaml: optim.lr must be a finite number above 0, found inf",
    "optim.lr=1" + "0" * 5000: "not a YAML value",
    "optim.lr=true": "run.yaml: optim.lr: expected float, found True",
    "optim.min_lr=1": "run.yaml: optim.min_lr 1 lies above lr 2e-05",
    "optim.betas=[0.9]": "run.yaml: optim.betas: expected 2 values, found 1",
    "optim.warmup_epochs=50": "run.yaml: optim.warmup_epochs 50 lies above train.epochs 1",
    "optim.weight_deca=1": "unknown key 'optim.weight_deca'; did you mean 'optim.weight_decay'?",
    "optim=3": "run.yaml: optim: expected a group of keys, found 3",
    "train.seed.x=3": "run.yaml: train.seed: expected int, found {{'x': 3}}",
    "train.reference_loss=true": "train.reference_loss gives LLaMA2-Accessory's numbers: set train.balance=microbatch",
    "train.balance=everything": "run.yaml: train.balance: 'everything' is not one of",
    "data.max_seq_len=1": "run.yaml: data.max_seq_len must be at least 2, for a token is learnt from those before it",
    "data.packing=1": "run.yaml: data.packing: expected bool, found 1",
    "data.packing=off": "run.yaml: data.packing: expected bool, found 'off'",
    "data.bad_records=no": "run.yaml: data.bad_records: 'no' is not one of 'error', 'skip'",
    "data.mix=": "'data.mix=': there is no value; is a variable not set?",
    "data.mix=null": "run.yaml: data.mix: expected str, found None",
    "data.mix=\"''\"": "run.yaml: data.mix is empty; is a variable not set?",
    """'data.mix="a\\0b"'""": "run.yaml: data.mix holds a NUL character",
    "data.mix=nowhere.yaml": "nowhere.yaml: no such file",
    "data.mix={home}": "{home}: a directory; expected a YAML",
    "data.mix={home}/tokenizer.model": "tokenizer.model: not valid YAML",
    "data.mix={home}/model.json": "model.json: a data mix is one key META with a list of sources",
    "data.mix={home}/talks.jsonl": "talks.jsonl: records, where a YAML mix is expected",
    "data.mix={odd}/pointer.yaml": "pointer.yaml: a Git-LFS pointer and not the file itself: run git lfs pull in {odd}",
    "data.mix={odd}/page.yaml": "page.yaml: a web page and not the file itself",
    "data.mix={odd}/mix_none.yaml": "a data mix is one key META",
    "data.mix={odd}/mix_word.yaml": "a data mix is one key META",
    "data.mix={odd}/mix_other.yaml": "a data mix is one key META",
    "data.mix={odd}/mix_path.yaml": "META entry 1: the key 'path' is missing",
    "data.mix={odd}/mix_key.yaml": "unknown key 'templat'; did you mean 'template'?",
    "data.mix={odd}/mix_template.yaml": "none",
    "data.mix={odd}/mix_ratio.yaml": "at most 1",
    "data.mix={odd}/mix_nan.yaml": "found nan",
    "data.mix={odd}/mix_suffix.yaml": "tokenizer.model: expected .jsonl",
    "data.mix={odd}/mix_gone.yaml": "gone.jsonl: no such file",
    "data.mix={odd}/mix_variable.yaml": "the variable is not set in the environment",
    "data.mix={odd}/mix_words.yaml": "words.jsonl:1: not valid JSON",
    "data.mix={odd}/mix_pointer.yaml": "pointer.jsonl: a Git-LFS pointer",
    "data.mix={odd}/mix_page.yaml": "page.jsonl: a web page",
    "model=null": "run.yaml: model: expected a group of keys, found None",
    "model.layout=dense": "run.yaml: model.layout: 'dense' is not one of 'mixtral', 'mixtral_sparse', 'mixtral_peft'",
    "model.layout=null": "name model.checkpoint (a directory to start from), or model.config, model.tokenizer and",
    "model.kernel=fast": "model.kernel: unknown kernel 'fast'; known: auto",
    "model.strict=7": "run.yaml: model.strict: expected bool, found 7",
    "model.checkpoint=[]": "run.yaml: model.checkpoint is an empty list",
    "model.checkpoint=\"''\"": "run.yaml: model.checkpoint is empty; is a variable not set?",
    "model.checkpoint=3": "run.yaml: model.checkpoint: expected str or list or null, found 3",
    "model.checkpoint=[\"''\"]": "run.yaml: model.checkpoint is empty",
    "model.checkpoint={home}": "{home}: no checkpoint in it, but below it: ckpt",
    "model.checkpoint={home}/run.yaml": "run.yaml: not a directory; expected a checkpoint",
    "model.checkpoint=nowhere": "nowhere: no such directory; expected a checkpoint",
    "model.checkpoint=mistralai/Mixtral-8x7B-v0.1": "hf download mistralai/Mixtral-8x7B-v0.1 --local-dir DIR",
    "model.checkpoint=https://huggingface.co/mistralai/Mixtral-8x7B-v0.1": "web addresses are not read, download it first",
    "model.checkpoint={odd}/ckpt_pointer model.config=null": "safetensors: a Git-LFS pointer and not the file itself",
    "model.checkpoint={odd}/hf_pointer model.config=null": "model.safetensors: a Git-LFS pointer and not the file itself",
    "model.checkpoint={odd}/hf_page model.config=null": "model.safetensors: a web page and not the file itself",
    "model.checkpoint={odd}/ckpt_words model.config=null": "safetensors: damaged or not a checkpoint file",
    "model.checkpoint={odd}/hf_nothing model.config=null": "model.safetensors: damaged or not a checkpoint file",
    "model.checkpoint={odd}/pickle model.config=null": "refused, it holds more than tensors (a pickle could run code)",
    "model.checkpoint={odd}/bare model.config=null": "bare: neither config.json nor params.json in it",
    "model.checkpoint={odd}/bare model.tokenizer=null": "bare: no tokenizer.model or tokenizer.json in it",
    "model.checkpoint=[{home}/ckpt,nowhere]": "nowhere: no such directory; expected a checkpoint",
    "model.config={home}": "{home}: a directory; expected a YAML or JSON file",
    "model.config=mistralai/Mixtral-8x7B-v0.1": "hf download mistralai/Mixtral-8x7B-v0.1 --local-dir DIR",
    "model.config={home}/tokenizer.model": "tokenizer.model: not valid YAML",
    "model.config={home}/mix.yaml": "mix.yaml: unknown key 'META'",
    "model.config={odd}/cut.json": "cut.json: not valid JSON",
    "model.config={odd}/deep.json": "deep.json: not valid JSON: nested too deeply",
    "model.config={odd}/latin1.json": "latin1.json: not valid JSON",
    "model.config={odd}/page.json": "page.json: a web page and not the file itself",
    "model.tokenizer={home}": "{home}: a directory; expected a tokenizer.model (SentencePiece) or tokenizer.json",
    "model.tokenizer=nowhere.model": "nowhere.model: no such file; expected a tokenizer.model",
    "model.tokenizer={home}/model.json": "model.json: not a tokenizer.json",
    "model.tokenizer={home}/mix.yaml": "mix.yaml: not a SentencePiece model",
    "model.tokenizer={odd}/pointer.model": "pointer.model: a Git-LFS pointer and not the file itself",
    "model.tokenizer={odd}/page.model": "page.model: a web page and not the file itself",
    "model.tokenizer={odd}/empty.model": "empty.model: not a SentencePiece model",
    "parallel.model_parallel=2": "parallel.model_parallel 2 does not divide the 1 processes: use one of [1]",
    "parallel.shard_size=3": "parallel.shard_size 3 does not divide the 1 data-parallel ranks",
    "parallel.data_parallel=tp": "run.yaml: parallel.data_parallel: 'tp' is not one of",
    "parallel.data_parallel=ddp parallel.shard_size=1": "run.yaml: parallel.data_parallel=ddp shards nothing",
    "parallel.precision=fp16": "run.yaml: parallel.precision: 'fp16' is not one of 'bf16', 'fp32', 'fp64'",
    "parallel.stall_timeout_s=0.1": "run.yaml: parallel.stall_timeout_s must be from 1 to 1800",
    "tuning.lora=3": "run.yaml: tuning.lora: expected a group of keys or null, found 3",
    "tuning.lora.rank=2": "run.yaml: adapters belong to a base: name one with model.checkpoint",
    "tuning.lora.rank=17 " + CHECKPOINT: "tuning.lora.rank 17 lies above 16, the greatest rank that a matrix",
    "tuning.lora.rank=100000000 " + CHECKPOINT: "tuning.lora.rank 100000000 lies above 16",
    "tuning.lora.targets=[] " + CHECKPOINT: "tuning.lora.targets is empty",
    "tuning.lora.targets=[expert_s] " + CHECKPOINT: "tuning.lora.targets: 'expert_s' matches none of the model's tensors",
    "tuning.lora.targets=3 " + CHECKPOINT: "run.yaml: tuning.lora.targets: expected list, found 3",
    "tuning.train=[routers]": "tuning.train: 'routers' matches none",
    "tuning.train=['(']": "tuning.train: '(' is not a regular expression",
    "tuning.freeze=[experts,attention,router,norms,embeddings,output]": "tuning.freeze leaves nothing to train",
    "tuning.train=[router] tuning.freeze=[experts]": "tuning.freeze: 'experts' does not train anyway",
    "save.only_trainable=true": "adapters belong to a base",
    "save.format=bin": "run.yaml: save.format: 'bin' is not one of 'safetensors', 'pth'",
    "save.format=pth tuning.train=norms save.only_trainable=true " + CHECKPOINT: "save.format=pth is of whole models",
    "save.state_every=null save.keep_states=3": "run.yaml: save.keep_states 3 keeps nothing while state_every is null",
    "save.state_every=null save.keep_every=3": "run.yaml: save.keep_every 3 is no multiple of state_every None",
    "save.state_every=10 save.keep_every=15": "run.yaml: save.keep_every 15 is no multiple of state_every 10",
    "log.wandb=on": "run.yaml: log.wandb: 'on' is not one of 'off', 'offline', 'online'",
    "log.alarms=3": "run.yaml: log.alarms: expected a group of keys, found 3",
    "resume=nowhere": "nowhere: no such directory; expected a training state",
    "resume=\"''\"": "run.yaml: resume is empty; is a variable not set?",
    "resume={home}/ckpt": "state.json: no such file; this is no training state",
    "resume={home}/run.yaml": "run.yaml: not a directory; expected a training state",
    "resume=[1]": "run.yaml: resume: expected str or null, found [1]",
    "out=\"''\"": "run.yaml: out is empty; is a variable not set?",
    "out=null": "run.yaml: out: expected str, found None",
    "out=3": "run.yaml: out: expected str, found 3",
    "out={home}/run.yaml": "run.yaml: cannot be written",
    "out={home}/run.yaml/a/b": "run.yaml/a/b: cannot be written (Not a directory)",
    "out=/proc/a/b": "/proc/a/b: cannot be written",
    "out={home}/" + "a" * 300: "File name too long",
    "=3": "'=3': an override is written key.sub=value",
    "seed": "'seed': an override is written key.sub=value",
    "seeds=1": "run.yaml: unknown key 'seeds'",
    "optim.lr=[1": "'optim.lr=[1': not a YAML value",
    "optim.lr.a.b=1 optim.lr.a=2 optim.lr.a.b=3": "'a' holds a value, not a group of keys",
}
MODELS = {  # what config.json says, by the name of the change: the sentence
    "layers": "n_layers must be at least 1 and below 10,000, found 1000000000",
    "no_layers": "n_layers must be at least 1 and below 10,000, found 0",
    "float_layers": "n_layers: expected int, found 1000000000.0",
    "vocabulary": "300 pieces but the model's vocab_size is 1000000000000",
    "width": "the model does not fit: this rank's share is",
    "negative": "hidden_dim must be at least 1, found -1",
    "odd_head": "head_dim must be even for rotary embedding, found 5",
    "heads": "n_kv_heads 3 must divide n_heads 4",
    "nan": "norm_eps must be a finite number above 0, found nan",
    "infinity": "rope_theta must be a finite number above 0, found inf",
    "nan_dim": "dim: expected int, found nan",
    "text": "dim: expected int, found '16'",
    "null": "dim: expected int, found None",
    "truth": "dim: expected int, found True",
    "list": "dim: expected int, found [16]",
    "experts": "moe.num_experts must be at least 1 and below 10,000, found 0",
    "many_experts": "moe.num_experts must be at least 1 and below 10,000, found 1000000000",
    "choices": "moe.num_experts_per_tok 5 lies above moe.num_experts 4",
    "no_choice": "moe.num_experts_per_tok must be at least 1, found 0",
    "moe": "moe: expected a group of keys, found 4",
    "weight": "load_balancing_weight must be at least 0, found -1.0",
    "window": "sliding_window must be at least 1, found 0",
    "rope": "rope_scaling must be above 0, found -2.0",
    "length": "max_seq_len must be at least 1, found 0",
    "unknown": "unknown key 'n_layer'; did you mean 'n_layers'?",
}
VERBS = {  # other command lines: the sentence
    "finetune nowhere.yaml": "nowhere.yaml: no such file; expected a YAML or JSON file",
    "finetune {home}": "{home}: a directory; expected a YAML or JSON file",
    "finetune {home}/run.yaml/a": "run.yaml/a: no such file",
    "finetune {odd}/list.yaml": "list.yaml: expected a mapping of keys to values, found list",
    "finetune {odd}/empty.yaml": "empty.yaml: expected a mapping of keys to values, found NoneType",
    "finetune {odd}/twice.yaml": "twice.yaml: not valid YAML: the key 'out' stands twice",
    "finetune {odd}/tabs.yaml": "tabs.yaml: not valid YAML",
    "finetune {odd}/date.yaml": "date.yaml: not valid YAML: month must be in 1..12",
    "finetune {odd}/python.yaml": "python.yaml: not valid YAML: could not determine a constructor",
    "finetune {odd}/number.yaml": "number.yaml: unknown key '1'",
    "finetune {odd}/bytes.yaml": "bytes.yaml: not valid YAML",
    "finetune {home}/mix.yaml": "mix.yaml: unknown key 'META'",
    "finetune {odd}/fifo.yaml": "fifo.yaml: a pipe or device, which cannot be read twice",
    "pretrain nowhere.yaml": "nowhere.yaml: no such file",
    "pretrain {home}/run.yaml optim.lr=-1 out={out}": "run.yaml: optim.lr must be above 0, found -1.0",
    "config nowhere.yaml": "nowhere.yaml: no such file",
    "config {home}/run.yaml train.epochs=0": "run.yaml: train.epochs must be at least 1",
    "config optim.lr=1": "optim.lr=1: no such file",
    "generate nowhere Why?": "nowhere: no such directory; expected a checkpoint",
    "generate mistralai/Mixtral-8x7B-v0.1 Why?": "hf download mistralai/Mixtral-8x7B-v0.1 --local-dir DIR",
    "generate {home}/run.yaml Why?": "run.yaml: not a directory; expected a checkpoint",
    "generate {home}/ckpt Why? --adapter nowhere": "nowhere: no such directory",
    "generate {home}/ckpt Why? --adapter {odd}/nothing": "nothing: no checkpoint in it",
    "generate {home}/ckpt Why? --template dialogue": "dialogue",
    "generate {home}/ckpt Why? --template chat_template": "no chat_template.jinja, nor a chat_template",
    "generate {odd}/bare Why?": "bare: neither config.json nor params.json in it",
    "generate {odd}/hf_pointer Why?": "model.safetensors: a Git-LFS pointer",
    "evaluate {home}/ckpt": "there is nothing to evaluate on: name --tasks, --data or both",
    "evaluate nowhere --data {home}/mix.yaml": "nowhere: no such directory; expected a checkpoint",
    "evaluate {home}/ckpt --data nowhere.yaml": "nowhere.yaml: no such file",
    "evaluate {home}/ckpt --data {home}/mix.yaml --against nowhere": "nowhere: no such directory; expected a checkpoint",
    "evaluate {home}/ckpt --data {home}/mix.yaml --out {out}/a/b.json": "b.json: cannot be written",
    "evaluate {home}/ckpt --data {home}/mix.yaml --max-seq-len 1": "max_seq_len must be at least 2",
    "evaluate {home}/ckpt --tasks mine --include nowhere": "nowhere: no such directory; expected a directory of YAML task",
    "compare nowhere": "nowhere: no such directory; expected a run directory",
    "compare {home}": "metrics.jsonl: no such file; expected a run directory",
    "compare {home}/run.yaml": "run.yaml: not a directory; expected a run directory",
    "compare {odd}/logged_none": "metrics.jsonl: no training step was logged",
    "compare {odd}/logged_rubbish": "metrics.jsonl: not the metrics of a run",
    "compare {odd}/logged_loss": "metrics.jsonl: not the metrics of a run",
    "compare {odd}/logged_page": "metrics.jsonl: a web page",
    "compare {home}/logged --png {out}/a/b.png": "b.png: cannot be written: No such file or directory",
    "compare {home}/logged --png {home}": "{home}: cannot be written: a directory; name a file",
    "convert nowhere {out} --to hf": "nowhere: no such directory; expected a checkpoint",
    "convert {home}/ckpt {home}/hf --to hf": "hf: exists already; name another directory",
    "convert {home}/ckpt {home}/run.yaml --to hf": "run.yaml: exists already",
    "convert {home}/ckpt {home}/run.yaml/a --to hf": "run.yaml/a: cannot be written (Not a directory)",
    "convert {home}/ckpt /proc/a --to hf": "/proc/a: cannot be written",
    "convert {home}/ckpt {out} --to hf --mp 2": "--mp 2: the format 'hf' is not cut",
    "convert {home}/ckpt {out} --to mixtral --mp 3": "model-parallel size 3 does not divide",
    "convert {home}/ckpt {out} --to mixtral --mp 1000000000000": "does not divide",
    "convert {home}/ckpt {out} --to hf --format pth": "the format 'hf' is written as safetensors only",
    "convert {home}/ckpt {out} --to peft": "there is no adapter to export",
    "convert {odd}/hf_page {out} --to mixtral": "model.safetensors: a web page",
    "convert {odd}/ckpt_pointer {out} --to hf": "safetensors: a Git-LFS pointer",
    "convert {odd}/pickle {out} --to hf": "refused, it holds more than tensors",
    "convert {home}/ckpt {out} --to hf --config nowhere.json": "nowhere.json: no such file",
    "convert {home}/ckpt {out} --to hf --config {odd}/config_vocabulary.json": "vocab_size is 1000000000000, but",
    "convert {home}/hf {out} --to mixtral --config {odd}/config_narrow.json": "hidden_dim is 12, but by {home}/hf",
    "merge {home}/ckpt {home}/hf {out}": "no adapter in it; accessory convert lays whole directories over one another",
    "merge nowhere {home}/hf {out}": "nowhere: no such directory",
    "merge {home}/ckpt nowhere {out}": "nowhere: no such directory",
    "inspect nowhere": "nowhere: no such directory; expected a checkpoint",
    "inspect {odd}/nothing": "nothing: no checkpoint in it",
    "inspect {odd}/hf_nothing": "model.safetensors: damaged or not a checkpoint file",
    "inspect {home}/ckpt --config {odd}/cut.json": "cut.json: not valid JSON",
    "verify {home}/ckpt nowhere": "nowhere: no such directory",
    "verify nowhere": "nowhere: no such directory; expected a training state",
    "verify {home}/ckpt": "{home}/ckpt: alone a training state can be verified; name the checkpoint to compare this with",
    "verify {home}/ckpt {odd}/hf_page": "model.safetensors: a web page",
    "certify --quick --world 0": "--world 0: expected numbers of processes, such as 1,2,4",
    "certify --quick --world 1,two": "--world 1,two: expected numbers of processes",
    "certify --quick --world -1": "--world -1: expected numbers of processes",
    "certify --quick --world 1000000": "--world 1000000, layout 'mixtral': model-parallel size",
    "certify --quick --only mp=64": "no cell of this certificate has that; settings: world, mp",
    "certify --quick --only rubbish": "no cell of this certificate has that",
    "certify --quick --model nowhere.json": "nowhere.json: no such file",
    "certify --quick --model {odd}/config_layers.json": "n_layers must be at least 1 and below 10,000",
    "certify --quick --model {odd}/config_width.json --world 1,2": "copies of the weights in fp64 need",
    "certify --quick --json {out}/a/b.json": "b.json: cannot be written",
    "certify --quick --html {home}": "{home}: cannot be written: a directory",
    "certify --against hf --precision fp64": "--against hf compares in fp32",
    "certify --quick --device cuda --world 64": "--device cuda needs a GPU for each process",
    "data check nowhere.yaml": "nowhere.yaml: no such file",
    "data check {home}/mix.yaml": "mix.yaml: give --tokenizer, so that lengths are known",
    "data check {home}/mix.yaml --tokenizer {home}/mix.yaml": "mix.yaml: not a SentencePiece model",
    "data check {home}/mix.yaml --tokenizer {odd}/pointer.model": "pointer.model: a Git-LFS pointer",
    "data check {home}/run.yaml --max-seq-len 1": "max_seq_len must be at least 2",
    "data check {home}/run.yaml --png {out}/a/b.png": "b.png: cannot be written",
    "data check {home}/run.yaml --png {home}": "{home}: cannot be written: a directory",
    "data show {home}": "{home}: a directory; expected a YAML or JSON file",
    "data show {odd}/mix_gone.yaml --tokenizer {home}/tokenizer.model": "gone.jsonl: no such file",
    "data stdlib {home}/run.yaml": "run.yaml: File exists",
    "data stdlib {home}/run.yaml/a": "run.yaml/a: Not a directory",
    "data stdlib /proc/a": "/proc/a: No such file or directory",
    "data tokenizer nowhere.yaml {out}": "nowhere.yaml: no such file",
    "data tokenizer {home}/mix.yaml {home}/tokenizer.model": "{home}/tokenizer.model: exists already; name another file",
    "data tokenizer {home}/mix.yaml {home}": "{home}: cannot be written: a directory; name a file",
    "data tokenizer {home}/mix.yaml {home}/run.yaml/a": "run.yaml",
    "data tokenizer {home}/mix.yaml {out} --vocab-size 100000": "no tokenizer of 100000 pieces can be trained on this text",
    "data tokenizer {home}/mix.yaml {out} --vocab-size 260": "no tokenizer of 260 pieces can be trained on this text",
    "data tokenizer {odd}/mix_words.yaml {out}": "words.jsonl:1: not valid JSON",
}
USAGE = {  # what argparse refuses: the end of its sentence
    "": "the following arguments are required: VERB",
    "finetun": "invalid choice: 'finetun'",
    "finetune": "the following arguments are required: config",
    "finetune ''": "argument config: is empty; is a variable not set?",
    "generate {home}/ckpt Why? --max-gen-length 3": "unknown option --max-gen-length; did you mean '--max-gen-len'?",
    "finetune run.yaml --lr 3": "unknown option --lr; known: --dry-run",
    "generate {home}/ckpt": "the following arguments are required: PROMPT",
    "generate {home}/ckpt ''": "argument PROMPT: is empty; is a variable not set?",
    "generate '' Why?": "argument checkpoint: is empty; is a variable not set?",
    "generate {home}/ckpt Why? --temperature -1": "argument --temperature: must be at least 0, found -1.0",
    "generate {home}/ckpt Why? --temperature nan": "argument --temperature: must be a finite number at least 0, found nan",
    "generate {home}/ckpt Why? --temperature inf": "argument --temperature: must be a finite number at least 0, found inf",
    "generate {home}/ckpt Why? --temperature hot": "argument --temperature: expected float, found 'hot'",
    "generate {home}/ckpt Why? --top-p 1.5": "argument --top-p: must be at least 0 and at most 1, found 1.5",
    "generate {home}/ckpt Why? --top-p nan": "argument --top-p: must be a finite number at least 0 and at most 1, found nan",
    "generate {home}/ckpt Why? --max-gen-len 0": "argument --max-gen-len: must be at least 1, found 0",
    "generate {home}/ckpt Why? --max-gen-len -5": "argument --max-gen-len: must be at least 1, found -5",
    "generate {home}/ckpt Why? --max-gen-len 1e9": "argument --max-gen-len: expected int, found '1e9'",
    "generate {home}/ckpt Why? --precision fp8": "argument --precision: invalid choice: 'fp8'",
    "generate {home}/ckpt Why? --layout dense": "argument --layout: invalid choice: 'dense'",
    "evaluate": "the following arguments are required: checkpoint",
    "evaluate {home}/ckpt --tasks ''": "argument --tasks: is empty; is a variable not set?",
    "evaluate {home}/ckpt --tasks mine --limit 0": "argument --limit: must be at least 1, found 0",
    "compare": "the following arguments are required: runs",
    "compare ''": "argument runs: is empty; is a variable not set?",
    "convert {home}/ckpt {out}": "the following arguments are required: --to",
    "convert {home}/ckpt {out} --to gguf": "argument --to: invalid choice: 'gguf'",
    "convert {home}/ckpt '' --to hf": "argument destination: is empty; is a variable not set?",
    "convert {home}/ckpt {out} --to mixtral --mp 0": "argument --mp: must be at least 1, found 0",
    "convert {home}/ckpt {out} --to mixtral --mp -1": "argument --mp: must be at least 1, found -1",
    "convert {home}/ckpt {out} --to mixtral --mp 2.5": "argument --mp: expected int, found '2.5'",
    "convert {home}/ckpt {out} --to hf --shard-gb 0": "argument --shard-gb: must be above 0, found 0.0",
    "convert {home}/ckpt {out} --to hf --shard-gb nan": "argument --shard-gb: must be a finite number above 0, found nan",
    "convert {home}/ckpt {out} --to hf --dtype int8": "argument --dtype: invalid choice: 'int8'",
    "merge {home}/ckpt {out}": "the following arguments are required",
    "merge {home}/ckpt {home}/hf {out} --mp 0": "argument --mp: must be at least 1, found 0",
    "inspect": "the following arguments are required: paths",
    "verify": "the following arguments are required: a",
    "verify {home}/ckpt {home}/hf --tolerance nan": "argument --tolerance: must be a finite number at least 0, found nan",
    "verify {home}/ckpt {home}/hf --tolerance -1": "argument --tolerance: must be at least 0, found -1.0",
    "certify --precision fp16": "argument --precision: invalid choice: 'fp16'",
    "certify --json ''": "argument --json: is empty; is a variable not set?",
    "data": "the following arguments are required: WHAT",
    "data chek": "invalid choice: 'chek'",
    "data check {home}/run.yaml -n -1": "argument -n: must be at least 0, found -1",
    "data check {home}/run.yaml --world 0": "argument --world: must be at least 1, found 0",
    "data check {home}/run.yaml --tokens-per-s -1": "argument --tokens-per-s: must be above 0, found -1.0",
    "data check {home}/run.yaml --tokens-per-s nan": "argument --tokens-per-s: must be a finite number above 0, found nan",
    "data check {home}/run.yaml --max-seq-len 0": "argument --max-seq-len: must be at least 1, found 0",
    "data show {home}/run.yaml -n many": "argument -n: expected int, found 'many'",
    "data tokenizer {home}/mix.yaml {out} --vocab-size 0": "argument --vocab-size: must be at least 260 and below",
    "data tokenizer {home}/mix.yaml {out} --vocab-size -1": "argument --vocab-size: must be at least 260",
    "data tokenizer {home}/mix.yaml ''": "argument out: is empty; is a variable not set?",
}


@pytest.fixture(scope="module")
def places():
    """A directory that anyone may enter, for some slips are those of a user who may not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        home = make_home(Path(name))
        odd = make_odd(home)
        os.mkfifo(odd / "fifo.yaml")
        yield {"home": home, "odd": odd}


def table():
    """(command line, exit code, sentence) of every slip."""
    run = "finetune {home}/run.yaml out={out} "
    for words, sentence in (*RUNS.items(), *settings()):
        yield run + words, 1, sentence
    for name, sentence in MODELS.items():
        yield f"{run} model.config={{odd}}/config_{name}.json", 1, sentence
    for number, file in enumerate(STAND_INS):
        sentence = f"{file.partition('/')[2]}: a {'Git-LFS pointer' if number % 2 else 'web page'} and not the file itself"
        yield f"convert {{odd}}/beside_{number} {{out}} --to mixtral", 1, sentence
    for words, sentence in VERBS.items():
        yield words, 1, sentence
    for words, sentence in USAGE.items():
        yield words, 2, sentence


def judge(code, out, err, expected, sentence):
    """What is wrong with an answer; nothing if all is as it should be."""
    said = [line for line in err.splitlines() if re.match(r"accessory[ \w]*: error: ", line)]
    if "Traceback" in out + err:
        return "a traceback"
    if code != expected:
        return f"exit code {code}"
    if len(said) != 1 or sentence not in said[0]:
        return "another sentence"
    if expected == 1 and err.splitlines() != said:
        return "more than the sentence"
    if re.search(r"^step +\d", out, re.M):
        return "it has trained"
    return None


def test_each_is_one_sentence(places, tmp_path):
    slips = list(table())
    outs = [tmp_path / f"out{number}" for number in range(len(slips))]
    lines = [line.format(**places, out=out) for (line, _, _), out in zip(slips, outs, strict=True)]
    answers = run_each([(shlex.split(line), "") for line in lines], tmp_path)
    wrong = []
    for line, (_, code, sentence), out, answer in zip(lines, slips, outs, answers, strict=True):
        fault = judge(*answer, code, sentence.format(**places, out=out))
        fault = fault or ("something is left behind" if out.exists() else None)
        if fault:
            wrong.append(f"{fault}: {line[:300]}\n    exit code {answer[0]}, {answer[2][-600:]}")
    assert len(slips) >= 150 and not wrong, f"{len(wrong)} of {len(slips)}:\n" + "\n".join(wrong)
