"""What is wrong with what became of a case: the table's promises, one after the other."""

import re

from table import CONTINUE, RAISE, STEP, STEPS, lost

CODES = {"kill": -9, "return": 0, "finish": 0, "exit": 3, "raise": 1}


def wrong(case, report):
    """A line for each promise that was not kept."""
    if "failed" in report:
        return [f"the case itself failed: {report['failed']}"]
    out = [f"rank {rank} hangs: {report['stacks'].get(str(rank), '')[-1500:]}" for rank in report["hung"]]
    if out:
        return out
    for rank in range(case["n"]):
        told, code = report["told"][str(rank)], report["codes"][str(rank)]
        if rank in case["victims"]:
            out += [f"rank {rank}, the victim: {line}" for line in _victim(case, told, code)]
        elif case["expect"] == "error" or rank in lost(case):
            out += [f"rank {rank}: {line}" for line in _error(case, told, code)]
        else:
            out += [f"rank {rank}: {line}" for line in _end(case, told, code)]
    return out + list(_together(case, report))


def _victim(case, told, code):
    act = case["act"]
    if act in CODES:
        if code != CODES[act]:
            yield f"ends with {code}"
    elif act == "late" or case["resume"] in ("soon", "recovered"):
        yield from _end(case, told, code, victim=True)
    else:  # stopped, and continued when the others are through, or have given up
        yield from _error(case, told, code, named=False)


def _error(case, told, code, named=None):
    """It ended in words."""
    if told.get("outcome") != "error" or code != 1:
        yield f"ends with {code}: {told}"
    elif not told["is_exchange_error"]:
        yield f"{told['type']}, no ExchangeError: {told['text']}"
    elif case["named"] if named is None else named:
        if not set(case["victims"]) & set(numbers(told["text"])):
            yield f"no victim is named: {told['text']}"
    if told.get("intact") is False:
        yield "the failed averaged() has changed parameters"


def numbers(text):
    """The ranks that a text names, but for the one that speaks first."""
    listed = re.findall(r"ranks? ((?:\d+(?:, )?)+)", text)
    return [int(number) for some in listed[1:] for number in re.findall(r"\d+", some)]


def _end(case, told, code, victim=False):
    """It went on to the end."""
    if told.get("outcome") != "end" or code != 0:
        yield f"ends with {code}: {told}"
        return
    came_back = victim and case["resume"] == "recovered"
    if told["steps"] != STEPS:
        yield f"is at step {told['steps']}"
    if not told["finite"]:
        yield "a parameter is not finite"
    if not came_back and not told["calls"] == told["own"] == STEPS:
        yield f"{told['calls']} calls of step(), {told['own']} local steps"
    if told.get("intact") is False:
        yield "averaged() has changed parameters"
    if case["mode"] == CONTINUE:
        yield from _went_on(case, told)


def _went_on(case, told):
    members = [rank for rank in range(case["n"]) if rank not in lost(case)]
    if case["resume"] == "recovered":
        members.append(case["n"])  # back, under another number
        if not told["apart"] < 0.1:
            yield f"{told['apart']:.3g} apart"
    if case["place"] == "end":  # who is through when it happens need not have heard of it
        members = told["members"]
    if case["per_machine"] == 1 and told["members"] != members:
        yield f"members {told['members']}, not {members}"
    if case["per_machine"] > 1 and not lost(case) and told["members"] != list(range(case["n"])):
        yield f"members {told['members']}"
    if "saved by" in told and (told["saved by"] != len(members) // case["per_machine"] or not told["back"]):
        yield f"the checkpoint is of {told['saved by']} workers, and what was saved came back: {told['back']}"


def _together(case, report):
    """What the ranks' words are in common."""
    told = [t for rank, t in report["told"].items() if int(rank) not in case["victims"]]
    ends = [t for t in told if t.get("outcome") == "end"]
    for what in ("mean", "distance"):
        if len({t[what] for t in ends if what in t}) > 1:
            yield f"the ranks do not agree on the {what}: {[t[what] for t in ends]}"
    if case["mode"] == RAISE and case["named"] and not any(t.get("peer") in case["victims"] for t in told):
        yield f"no error's peer is a victim: {[t.get('peer') for t in told]}"
    if case["place"] == "unsent" and case["act"] == "kill":  # nobody is ahead by more than what was sent
        steps = [t["step"] for t in told if t.get("outcome") == "error" and t.get("step") is not None]
        if steps and min(steps) < STEP:
            yield f"errors of steps {steps}"
