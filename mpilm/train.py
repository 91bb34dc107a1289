"""Train a language model: mpirun -np 8 python -m mpilm.train [--config FILE.toml] [--section.option VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from mpilm import launch, options, startup
from mpilm.asked import Asked
from mpilm.config import Config
from mpilm.launch import World
from mpilm.lock import Claim
from mpilm.log import UserError, say, warn

if TYPE_CHECKING:
    from mpilm.server import Serving
    from mpilm.trainer import Trainer

CORPUS = "corpus"  # folder of the built-in corpus, beside the runs
PROMPT, SAMPLE_TOKENS = "import ", 120
SAMPLED = 300_000_000   # parameters of a model that rank 0 may load at the end, and have write for a minute
WAIT_S = 5.0  # a run that was killed may take so long to end
DESCRIPTION = "Train a language model on the ranks that mpirun or srun started; without them, on one."


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, launch, train, tell what came out."""
    config = options.parse(argv, description=DESCRIPTION)
    with (Asked(config.run, for_good=argv is None) as asked,
          launch.session(device=config.run.device) as world, ExitStack() as stack):
        with startup.loading():
            from mpilm import recovery

        directory = RunDirectory(config, stack)
        recovery.Run(config, world, asked, directory.prepare, directory.greet, summarize).run()


class RunDirectory:
    """Where the run writes; its ranks keep other jobs out of it until `stack` is unwound."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self.config, self.path = config, config.run.dir
        self.claim = Claim(Path(config.run.dir), wait_s=WAIT_S, otherwise="give another --run.dir")
        stack.callback(self.claim.release)

    def prepare(self, world: World) -> None:
        """Have the lock, a log and something to train on. Collective over the world."""
        from mpilm import alike

        alike.require(world.comm, self.config.to_dict(), "the options are not those of rank 0 (another file or command "
                                                         "line there?)")
        self.greet(world)
        for text in options.idle(self.config):
            warn(text)
        self.config.data.path = self.config.data.path or built_in(world)

    def lock(self, world: World) -> None:
        """Rank 0 leads, all follow, and no other job comes in between. Collective over the world.

        Raises:
            UserError: Another job is there.
        """
        alone = not any(world.comm.allgather(self.claim.follows))
        launch.on_root(world.comm, lambda: self.claim.lead(alone=alone))
        problem = None
        try:
            self.claim.follow()
        except (UserError, OSError) as error:
            problem = error
        launch.agree(world.comm, problem)

    def greet(self, world: World) -> None:
        """Rank 0, which may be another one than before, takes the lock and then writes the log. Collective over the
        world."""
        launch.on_root(world.comm, lambda: launch.make_directory(self.path))
        self.lock(world)
        launch.greet(world, self.path)


def built_in(world: World) -> str:
    """The built-in corpus, prepared where it is missing. Collective over the world."""
    from data_prep import corpus

    return str(corpus.prepare(CORPUS, world.comm, threads=world.threads))


def summarize(program: Trainer | Serving, config: Config, world: World) -> None:
    """Print validation loss beside the unigram entropy, a sample, and where the run is. Collective over the world."""
    from mpilm import assemble, generate, resume, trained
    from mpilm.checkpoint import parameters
    from mpilm.data.shards import unigram_entropy
    from mpilm.model.cache import Cache
    from mpilm.parallel import layout

    validation = program.validation
    measured = (validation.after(program.state.step), validation.tokens) if validation is not None else None
    measured, speeds = world.comm.bcast((measured, program.speeds), root=layout.num_servers(config))
    path = world.comm.bcast(str(program.saver.path))    # known to those who saved
    lines = [f"finished at step {program.state.step}"]
    if measured is not None:
        split = assemble.open_split(config, "validation")
        entropy, (loss, tokens) = unigram_entropy(split), measured
        lines.append(f"validation loss   {loss:.4f} nats per token, over {tokens:,} of {split.num_tokens:,} tokens")
        lines.append(f"unigram entropy   {entropy:.4f} nats per token (what knowing only the frequencies gives)")
    if speeds:
        lines.append(f"speed             {median(speeds):,.0f} tokens/s")
    else:
        lines.append("nothing was left to train: raise --run.steps, or give another --run.dir")
    lines.append(f"run directory     {config.run.dir}")
    say("\n" + "\n".join(lines))
    reader = resume.open_run(path, world.comm)  # a rank of a pipeline has only a part of the model
    if parameters(reader) > SAMPLED:
        say(f"\npython -m mpilm.generate {config.run.dir} has it write")
    elif world.rank == 0:
        try:
            text = generate.sample(trained.model(reader, context=Cache()), config.data.path, PROMPT, temperature=0.7,
                                   num_tokens=SAMPLE_TOKENS, context=config.data.sequence_length, seed=config.run.seed)
            say(f"\nthe model writes:\n{text}")
        except UserError as error:
            warn(str(error))
    world.comm.Barrier()


if __name__ == "__main__":
    launch.command(main)
