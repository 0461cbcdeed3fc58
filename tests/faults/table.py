"""The table: what happens to which rank, where, under which optimizer, and what is to become of the others.

A case is a dict, for it travels to faults_script.py as a line of JSON:

    place       where it happens, see places.py
    act         what the victim does there: kill, stop (itself), return, finish (its loop ends before the others', and
                it calls finish()), raise, exit, late (it sleeps); store: the store is killed
    victims     ranks
    then        a place in a recovery: there, and not at the first place, the last of the victims meets its end
    optimizer   a name of OPTIMIZERS
    mode        on_failure
    resume      of a stopped one: "soon", once the others have "recovered", once they have "ended"
    expect      of the others: "end" (exit 0), "error" (an ExchangeError)
    streamed    over a transport that is like NCCL, streamed_transport.py
    named       whether each of the others must name a victim
"""

OPTIMIZERS = {
    "default": {},
    "overlap": {"overlap": True},
    "awc": {"schedule": "awc"},
    "gossip": {},
    "outer": {"outer": "mi-dmsgd", "every": 2, "schedule": "awc"},  # Gossip, in rounds
    "hierarchical": {"hierarchical": True},  # 2 machines x 2 ranks
}
MORE = {"pmsgd": {"method": "pmsgd"}}
STEP, STEPS = 4, 18  # the fault is in step 4 of 18
# Seconds. Where a connection closes nobody waits for the timeout; it is long, so that a busy machine is not taken for a
# silent one. Where silence is all there is, the timeout is waited for.
LONG, SHORT = 20.0, 5.0
RAISE, CONTINUE = "raise", "continue"


def case(act, place, victims, optimizer="default", mode=RAISE, n=4, **more):
    per_machine = 2 if optimizer == "hierarchical" else 1
    silent = act in ("stop", "finish") or more.get("loader")
    silent = silent or place == "built" or (place == "before-saving" and mode == RAISE)  # no connection is in use
    out = dict(
        act=act, place=place, victims=list(victims), optimizer=optimizer, mode=mode, n=n, per_machine=per_machine,
        timeout=SHORT if silent else LONG, resume=None, expect="error" if mode == RAISE else "end", named=mode == RAISE,
        loader=False, then=None, streamed=False,
    )  # fmt: skip
    out |= more
    who = "+".join(map(str, victims))
    parts = [act, who, place, out["then"], optimizer, mode]
    parts += [f"{n}workers"] * (n != 4) + ["loader"] * out["loader"] + ["streamed"] * out["streamed"]
    parts += [f"until-{out['resume']}"] * bool(out["resume"])
    out["id"] = "-".join(p for p in parts if p)
    return out


def lost(case):
    """The ranks that do not come to the end by themselves: a machine goes as one."""
    if case["act"] in ("late", "store") or case["resume"] == "soon":
        return set()
    size = case["per_machine"]
    return {r for r in range(case["n"]) if any(r // size == victim // size for victim in case["victims"])}


def _table():
    for mode in (RAISE, CONTINUE):
        for name in OPTIMIZERS:
            for place, victims in (("sent", [1]), ("sent", [0]), ("unsent", [1]), ("between", [2]), ("first", [1])):
                yield case("kill", place, victims, name, mode)
            two = [2, 3] if name == "hierarchical" else [1, 2]
            yield case("kill", "sent", two, name, mode, n=4 if name == "hierarchical" else 5)
            yield case("store", "between", [], name, mode, expect="end", named=False)
            yield case("stop", "sent", [1], name, mode, resume="soon", timeout=LONG, expect="end", named=False)
            yield case("stop", "sent", [1], name, mode, resume="ended")
            for act in ("return", "finish", "raise", "exit") if name == "default" else ("return",):
                yield case(act, "between", [1], name, mode)
        for name in ("default", "gossip", "outer", "hierarchical"):
            for place, victims in (("averaged", [1]), ("averaged", [0]), ("distance", [1])):
                yield case("kill", place, victims, name, mode)
            for place, victims in (("saving", [1]), ("saving", [0]), ("before-saving", [1])):
                yield case("kill", place, victims, name, mode, named=mode == RAISE)
        yield case("stop", "before-saving", [1], "default", mode, resume="ended")
        yield case("stop", "before-saving", [1], "gossip", mode, resume="ended")
        # There is nothing to go on from before all are there.
        for place, victims in (("built", [1]), ("built", [0]), ("settings", [1]), ("settings", [0])):
            yield case("kill", place, victims, "default", mode, expect="error", named=place == "built")
        yield case("kill", "broadcast", [0], "default", mode, expect="error", named=False)
        for name in ("default", "awc"):
            yield case("kill", "end", [1], name, mode, expect="end", named=False)
            yield case("kill", "end", [0], name, mode, expect="end", named=False)
        for n in range(2, 9):
            yield case("late", "last", [1], "default", mode, n=n, expect="end", named=False)
        yield case("late", "last", [0], "awc", mode, expect="end", named=False)
        yield case("kill", "sent", [1], "default", mode, loader=True)
        yield case("kill", "sent", [1], "overlap", mode, loader=True)
        yield case("kill", "averaged", [1], "default", mode, loader=True)
    for name in ("default", "overlap", "awc", "gossip"):
        yield case("stop", "sent", [1], name, CONTINUE, resume="recovered")
        for then in ("agreeing", "forming", "connecting", "settling"):
            yield case("kill", "sent", [1, 2], name, CONTINUE, n=5, then=then)
    for name in ("default", "hierarchical"):
        yield case("kill", "confirming", [1], name, CONTINUE)
    for victims in ([1], [1, 2, 6]):  # several all-reduces are under way
        yield case("kill", "sent", victims, "pmsgd", CONTINUE, n=8)
    for name in OPTIMIZERS:  # NCCL's part is played by streamed_transport.py
        for place, victims in (("sent", [1]), ("sent", [0]), ("unsent", [1]), ("between", [2])):
            yield case("kill", place, victims, name, CONTINUE, streamed=True)
        for place in ("averaged", "saving"):
            yield case("kill", place, [1], name, CONTINUE, streamed=True)
        yield case("stop", "sent", [1], name, CONTINUE, resume="soon", timeout=LONG, named=False, streamed=True)
        yield case("stop", "sent", [1], name, CONTINUE, resume="ended", streamed=True)
        yield case("return", "between", [1], name, CONTINUE, streamed=True)
    for name in ("default", "awc"):
        yield case("stop", "sent", [1], name, CONTINUE, resume="recovered", streamed=True)
        for then in ("agreeing", "forming", "connecting", "settling"):
            yield case("kill", "sent", [1, 2], name, CONTINUE, n=5, then=then, streamed=True)


CASES = list(_table())
EVERYDAY = {
    "kill-1-sent-default-raise", "kill-0-sent-default-continue", "kill-1-unsent-awc-continue",
    "kill-1-sent-gossip-raise", "kill-1-averaged-default-raise", "kill-1-averaged-default-continue",
    "kill-1-saving-default-raise", "kill-0-saving-default-continue", "kill-0-end-default-raise",
    "kill-0-settings-default-raise", "kill-1+2-sent-overlap-continue-5workers", "store-between-default-continue",
    "stop-1-sent-default-raise-until-ended", "stop-1-sent-default-continue-until-recovered",
    "return-1-between-default-raise", "late-1-last-default-raise-3workers", "kill-1-sent-hierarchical-raise",
    "kill-1-sent-awc-continue-streamed", "kill-1-sent-outer-continue",
}  # fmt: skip
assert EVERYDAY <= {case["id"] for case in CASES}
