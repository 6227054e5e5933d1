"""What follows from the figures of --check: what limits a run, which flags to give, how long it lasts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storage.files import escape
from storage.inspection import DiskReads
from storage.lists import as_text, name_some
from training.progress import duration

RESERVE = 1.25  # times the data that a step needs, which its workers should give
CLOSE, SLOWED = 1.1, 1.25  # times the best: as good as it, as two measurements differ; and worth a word
SHOWN = 10  # bad files that are named
FEWEST_COLD = 20  # images that have to be read from a disk to say how fast it is
FASTER_DATA = "pack the data (tools/pack_dataset.py), or pretrain with --repeated_sampling 4"


class Pass(NamedTuple):
    """Forward passes of so many images: seconds of one that accumulates, and of one that also updates; peak memory."""

    images: int
    accumulate_s: float
    update_s: float
    memory_gb: float

    def step_s(self, batch: int) -> float:
        """Give the seconds of an optimizer step of a batch."""
        return (batch // self.images - 1) * self.accumulate_s + self.update_s


@dataclass
class Findings:
    """What a process has and what was measured of it; `batch` and `images` are those of a step and of a pass.

    `given` is the pass of `images`, extended where it was too slow to measure; None where it does not fit into memory.
    `image_s` is what an image costs a data worker, `live_s` a step with the run's own, None where it was too slow.
    """

    batch: int
    images: int
    threads: int  # that compute
    cores: int
    steps: int  # that are left of the run
    keeps_pass: bool = False  # as a result hangs on it, by batch norm
    workers: int = 0
    image_s: float = 0.0
    passes: list[Pass] = field(default_factory=list)
    given: Pass | None = None
    live_s: float | None = None
    evaluations: int = 0
    evaluation_s: float = 0.0
    saves: int = 0
    save_s: float = 0.0


def candidates(batch: int, images: int, part: int) -> list[int]:
    """Give the sizes of a pass to try: multiples of `part` that divide a batch, doubling, and the given one."""
    chosen, least = {images}, part
    for size in range(part, min(batch, 4 * images) + 1, part):
        if batch % size == 0 and size >= least:
            chosen.add(size)
            least = 2 * size
    return sorted(chosen)


def extend(passes: Sequence[Pass], images: int) -> Pass:
    """Give the pass of so many images: as measured, or on the line through the two largest that were."""
    for known in passes:
        if known.images == images:
            return known
    last = passes[-1]
    before = passes[-2] if len(passes) > 1 else Pass(0, 0.0, 0.0, last.memory_gb)
    ahead = (images - last.images) / (last.images - before.images)
    return Pass(images, *(b + max(0.0, b - a) * ahead for a, b in zip(before[1:], last[1:], strict=True)))


def step_seconds(compute_s: float, data_s: float, workers: int, threads: int, cores: int) -> float:
    """Give the seconds of a step whose images cost a data worker `data_s`, on cores that computing shares with them."""
    if not workers:
        return compute_s + data_s
    return max(compute_s, data_s / min(workers, cores), (threads * compute_s + data_s) / cores)


def choose_workers(compute_s: float, data_s: float, threads: int, cores: int) -> int:
    """Give the fewest data workers with which a step is as fast as with any number."""
    times = [step_seconds(compute_s, RESERVE * data_s, workers, threads, cores) for workers in range(1, cores + 1)]
    return 1 + next(index for index, seconds in enumerate(times) if seconds <= CLOSE * min(times))


def choose_pass(found: Findings) -> Pass:
    """Give the pass with which a step is fastest: the given one where it is as fast, else the smallest that is."""
    if found.given is not None and found.keeps_pass:
        return found.given
    fitting = sorted({*found.passes} | ({found.given} if found.given else set()))
    good = [one for one in fitting if one.step_s(found.batch) <= CLOSE * min(x.step_s(found.batch) for x in fitting)]
    return found.given if found.given in good else good[0]


def count_due(first: int, last: int, intervals: Sequence[int]) -> int:
    """Count the epochs after `first`, up to `last`, at whose end one of these intervals is due, as at the last."""
    return sum(e == last or any(e % interval == 0 for interval in intervals) for e in range(first + 1, last + 1))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe_data(
    total: int, heads: int, decoded: int, bad: Mapping[str, str], max_bad: float, disk: DiskReads | None, free: float
) -> dict[str, str]:
    """Say which files are bad, of how many, and how fast the disk is; `free` are the bytes of memory that are."""
    named = [f"{escape(as_text(path), also_bytes=True)}  {' '.join(reason.split())}" for path, reason in bad.items()]
    found = f"{len(bad)} cannot be used:\n  " + name_some(named, SHOWN, "\n  ") if bad else "all can be used"
    if len(bad) > max_bad * total:
        found += f"\n  so the run would stop: that is more than --max_bad_fraction {max_bad:g} allows"
    if disk is None:
        text = "not measured: nothing tells here which images are in memory already"
    elif disk.cold < FEWEST_COLD:
        text = f"not measured: of {disk.looked} images of a sample {disk.looked - disk.cold} are in memory already"
    else:
        fits = "only the first epoch reads them, as they fit" if disk.size_of(total) < free else "they do not fit"
        rates = (number(rate / disk.seconds) for rate in (disk.cold_bytes / 1e6, disk.cold))
        text = "{} MB/s, {} images/s, to one reader".format(*rates)
        text += f" (of {disk.cold} of {disk.looked} images, which were not in memory)"
        text += f"; all images have {disk.size_of(total) / 1e9:.3g} GB, and {fits} into memory"
    return {"files": f"{heads:,} heads of {total:,} read, {decoded:,} samples decoded: {found}", "disk": text}


def advise(found: Findings) -> dict[str, str]:
    """Give what to know and to do, as texts by their names."""
    best, data_s, shared = choose_pass(found), found.batch * found.image_s, (found.threads, found.cores)
    compute_s, best_s = (one.step_s(found.batch) for one in (found.given or best, best))
    alone_s = step_seconds(compute_s, data_s, found.workers, *shared)
    step_s, workers = found.live_s or alone_s, choose_workers(best_s, data_s, *shared)
    wait_s = data_s / max(1, min(found.workers, found.cores))
    limit = "computing" if compute_s >= wait_s else "data"
    if found.workers and alone_s > max(compute_s, wait_s):
        limit = "cores, which computing and data workers share"
    text = (
        f"{limit}: a step of {found.batch} images takes {number(compute_s)} s to compute, {number(wait_s)} s to decode"
    )
    text += f"; together {number(step_s)} s" if found.live_s else "; too slow to be measured together"
    if step_seconds(best_s, data_s, workers, *shared) > SLOWED * best_s:
        text += f". More cores would help; else {FASTER_DATA}"
    elif step_s > SLOWED * alone_s:
        text += ". Something else takes cores or memory from it"
    rates = ", ".join(f"{number(found.batch / one.step_s(found.batch))} by {one.images}" for one in found.passes)
    peaks = ", ".join(f"{number(one.memory_gb)} by {one.images}" for one in found.passes)
    why = "as given" if best == found.given else f"forward passes of {best.images} images, not {found.images}"
    why += ", which batch norm notices" if best != found.given and found.keeps_pass else ""
    flags = f"--per_gpu_batch_size {found.batch} --gradient_accumulation_steps {found.batch // best.images}"
    parts = {"steps": (found.steps, step_s), "evaluations": (found.evaluations, found.evaluation_s)}
    parts["saves"] = found.saves, found.save_s
    listed = ", ".join(f"{count:,} {name} x {number(seconds)} s" for name, (count, seconds) in parts.items())
    total_s = sum(count * seconds for count, seconds in parts.values())
    return {
        "images/s": f"computing alone, by images of a forward pass: {rates}",
        "memory": f"peak in GB: {peaks}" + ("" if found.given else f"; {found.images} do not fit"),
        "data worker": f"one decodes {number(1 / found.image_s)} images/s",
        "limit": text,
        "take": f"{flags} ({why}) --num_workers {workers} ("
        + ("as given)" if workers == found.workers else f"not {found.workers})"),
        "duration": f"{duration(total_s)} with the flags as given: {listed}",
    }
