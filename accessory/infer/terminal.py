"""The ``chat`` verb: a conversation in the terminal, its answers as they grow."""

import argparse
import json
import signal
from pathlib import Path
from typing import Any

from accessory.errors import UserError, sentence, stop_on_signals
from accessory.infer.chat import answer_job, check_template, load, sampling_of, showing
from accessory.infer.meta import MetaModel
from accessory.infer.offload import tell_offload
from accessory.infer.sampling import Sampling
from accessory.parallel.launch import Launch
from accessory.visual.images import check_image

HELP = """\
/reset        begin anew        /undo         take the last question and its answer back
/retry        another answer    /save FILE    write the conversation (JSON)
/system TEXT  begin anew, with this system prompt; without TEXT: none
/image FILE   show this with the next question
/help         this              Ctrl-C        ends an answer; here, as Ctrl-D does, the chat"""


def run_chat(arguments: argparse.Namespace) -> None:
    """The ``chat`` verb."""
    answer_job(chat, arguments)


def chat(arguments: argparse.Namespace, launch: Launch) -> None:
    """Talk on rank 0; the other ranks follow."""
    check_template(arguments.template)
    model = load(arguments, launch)
    talk = Chat(model, sampling_of(arguments), arguments.template, arguments.system)
    model.engine.lead(talk.run)


class Chat:
    """A conversation: ``messages`` are its turns, as ``MetaModel.asked`` takes them."""

    def __init__(self, model: MetaModel, sampling: Sampling, template: str | None, system: str | None):
        self.model, self.sampling, self.template = model, sampling, template
        self.begin(system)

    def begin(self, system: str | None) -> None:
        self.images: list[Path] = []  # for the next question
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        print("/help says what can be done here; Ctrl-D ends", flush=True)
        while (line := self._line()) is not None:
            try:
                if line.startswith("/"):
                    self.command(*line[1:].split(maxsplit=1))
                elif line:
                    self.ask(line)
            except (UserError, OSError) as error:  # of this line; the chat goes on
                print(sentence(error) or error, flush=True)
        tell_offload(self.model.llma)

    def command(self, name: str = "", rest: str = "") -> None:
        """What a line that begins with / asks for."""
        last = self.messages[-1]["role"] if self.messages else None
        if name == "reset":
            self.begin(next((m["content"] for m in self.messages if m["role"] == "system"), None))
        elif name == "system":
            self.begin(rest or None)
        elif name in ("undo", "retry") and last == "assistant":
            question = self.messages[-2]
            del self.messages[-2:]
            if name == "retry":
                self.messages.append(question)
                self.answer()
        elif name == "image" and rest:
            if not self.model.llma.sight:
                raise UserError("this model reads text only")
            check_image(rest.strip())
            self.images.append(Path(rest.strip()))
        elif name == "save" and rest:
            file = Path(rest.strip())
            file.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")
            print(f"wrote {file}", flush=True)
        elif name in ("undo", "retry"):
            raise UserError("nothing was answered yet")
        else:
            print(HELP, flush=True)

    def ask(self, line: str) -> None:
        """Ask a question, with the images that were named before it; what is refused leaves them for the next one."""
        self.messages.append({"role": "user", "content": showing(line, self.images) if self.images else line})
        self.answer()
        self.images = []

    def answer(self) -> None:
        """Write the answer to the last question as it grows; Ctrl-C ends it there."""
        engine = self.model.engine
        try:
            prompt, stops = self.model.asked(self.messages, self.template)
            request = engine.submit(prompt.tokens, self.sampling.stopping_at(stops), None, prompt.images)
        except UserError:
            del self.messages[-1]
            raise
        stopped = False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True

        signal.signal(signal.SIGINT, stop)
        for step in engine.run():
            for progress in step:
                print(progress.text, end="", flush=True)
            if stopped:
                print(engine.cancel(request), end=" ...", flush=True)
        stop_on_signals()
        print(flush=True)
        self.messages.append({"role": "assistant", "content": request.text.strip()})

    def _line(self) -> str | None:
        try:
            with self.model.engine.kept_awake():
                return input("> ").strip()
        except EOFError:
            print(flush=True)
            return None
