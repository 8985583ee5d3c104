"""Train a model.

    python train.py tiny                                   # a config of configs/, or a file with `def config()`
    python train.py tiny --steps 50 --optimizer.peak-lr 1e-3
    python train.py tiny --help                            # every field

The same command resumes a run that was stopped, in whatever way. Flags that make it another run give it another name,
such as runs/tiny,optimizer.peak_lr=0.001, unless --name does. On several hosts it is the same command on each
(docs/clusters.md). Where the package is installed without this file, `llama4 train` is the same command.
docs/training.md says what can be read, and what the figures mean.
"""

import dataclasses
import sys
import traceback

from llama4_jax.configs import config_names, load_config


def read_config(arguments: list[str], prog: str):
    """The config that the command line names, with its flags. Raises ValueError, and SystemExit for wrong flags."""
    base = load_config(arguments[0])
    import tyro

    from llama4_jax.config import RunConfig, name_of_variant

    config = tyro.cli(
        RunConfig,
        prog=f"{prog} {arguments[0]}",
        args=arguments[1:],
        default=base,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if not any(argument.split("=")[0] == "--name" for argument in arguments):
        config = dataclasses.replace(config, name=name_of_variant(base, config))
    if config.init_from is not None:
        from llama4_jax.train.begin import begun_from, given_fields

        config, said = begun_from(config, given_fields(arguments))
        print(*said, sep="\n", file=sys.stderr)
    return config


def main(arguments: list[str], prog: str = "train.py") -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, "\nConfigs:", ", ".join(config_names()))
        return 0 if arguments else 2
    if {"-h", "--help"} & set(arguments):
        read_config(arguments, prog)
    import jax

    from llama4_jax.compilation_cache import keep_compiled
    from llama4_jax.train import hosts

    try:
        hosts.connect()
        with hosts.together("reading the config"):
            config = read_config(arguments, prog)
        # On a CPU a mesh is made of virtual devices. This must be said before the first device is asked for.
        jax.config.update("jax_num_cpu_devices", max(1, config.mesh.named_size // hosts.count()))
        keep_compiled()
        from llama4_jax.train.loop import NotFinite, train

        try:
            train(config)
        except NotFinite as error:  # on every host
            print(f"{prog}: {error}", file=sys.stderr)
            return 1
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        if not isinstance(error, hosts.OnEveryHost):
            hosts.leave(str(error), 2)
        return 2
    except SystemExit:
        hosts.leave("its command line has a mistake, which it has printed", 2)
        raise
    except BaseException as error:
        if hosts.count() > 1:
            traceback.print_exc()
            hosts.leave(f"{type(error).__name__}: {error}", 1)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
