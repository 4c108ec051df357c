"""Scores a checkpoint on tasks of the Language Model Evaluation Harness: `llama evaluate --tasks ...`.

Under torchrun at the checkpoint's model-parallel size; more ranks are replicas, which share the requests.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from llama.distributed.groups import is_first_rank
from llama.tools import commandline


@partial(commandline.with_build_flags, reuse_prefixes=True)
def main(
    tasks: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 8,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    gen_kwargs: str | None = None,
    output: str | None = None,
    log_samples: bool = False,
    use_cache: str | None = None,
    add_bos_token: bool = True,
    **build: Any,
) -> None:
    """Score a checkpoint on tasks of the harness, and print its table of results.

    Args:
        tasks: names of tasks or groups, with commas between them.
        ckpt_dir: folder of params.json and consolidated.NN.pth; by default the toy one.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        max_seq_len: maximum number of tokens of a context and its continuation; contexts are truncated from the left.
        max_batch_size: maximum number of requests that each replica computes at a time.
        include_path: folder of further tasks, as YAML files.
        num_fewshot: number of examples in the context; by default the task's.
        limit: number of documents per task, or their share if below 1.
        apply_chat_template: puts contexts into the checkpoint's chat template, by default Llama 2's.
        system_instruction: text in front of the context, or system message of the template.
        gen_kwargs: overrides of the tasks' generation arguments, such as temperature=0,max_gen_toks=64.
        output: path of a JSON file for the results.
        log_samples: adds each document's results to that file.
        use_cache: path of a cache of results; an interrupted evaluation continues from it. One per checkpoint.
        add_bos_token: whether texts begin with BOS, as the checkpoints expect.
    """
    from llama.tools.harness import LlamaLM, sampling_params  # the extra [eval]; its error names it

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks must have at least one name, got none")
    if output and not Path(output).resolve().parent.is_dir():
        raise ValueError(f"--output must be a path in a folder that exists, got {output}")
    from lm_eval import simple_evaluate, utils

    manager = _task_manager(names, include_path)
    overrides = utils.simple_parse_args_string(gen_kwargs)
    try:  # as overrides of a task that asks for little, as what the tasks themselves ask for is not known yet
        sampling_params({"max_gen_toks": 1, "do_sample": False} | overrides, max_seq_len)
    except ValueError as error:
        raise ValueError(f"--gen_kwargs must be generation arguments that this command takes: {error}") from error
    paths = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    lm = LlamaLM(*paths, max_seq_len, max_batch_size, add_bos_token=add_bos_token, **build)
    results = simple_evaluate(
        lm,
        tasks=names,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        gen_kwargs=overrides or None,
        log_samples=log_samples,
        use_cache=use_cache,
    )
    if is_first_rank():
        _report(results, output)


def _task_manager(names: list[str], include_path: str | None) -> Any:
    """The harness's index of tasks.

    Raises:
        ValueError: it has no task of one of the names.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include_path must be a folder of tasks, got no folder {include_path}")
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"--tasks must be names of tasks of the harness or of --include_path, got {name}; "
                "lm_eval ls tasks lists the harness's"
            )
    return manager


def _report(results: dict[str, Any], output: str | None) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if output:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        Path(output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    commandline.run(main, name="llama evaluate")
