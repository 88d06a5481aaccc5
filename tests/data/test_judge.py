"A program and its tests in two interpreters: honest programs are judged as ever, and cheating earns nothing."
import ast
import contextlib
import io
import json
import math
import os
import random
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import PROGRAMS

from copd_nb.data import peers as peers_module
from copd_nb.data import sandbox as sandbox_module
from copd_nb.data import values as values_module
from copd_nb.data.capability import Example
from copd_nb.data.machine import missing
from copd_nb.data.peers import Peer
from copd_nb.data.sandbox import isolation, judge_code
from copd_nb.data.wire import LARGEST, Reader, Writer
from copd_nb.data.programs import QUIET, CodeTests
from copd_nb.data.verifiers import check_answer

pytestmark = pytest.mark.skipif(bool(missing()), reason="hostile programs run in the sandbox only")
LINUX = all(isolation().values())
full = pytest.mark.skipif(not LINUX, reason="this machine does not permit all of the isolation")
WAYS = [(), ("view",), ("namespaces",), ("namespaces", "view", "user")]
each_way = pytest.mark.parametrize("without", WAYS, ids=lambda w: "without " + " ".join(w) if w else "all")
SQUARES = """assert f(2) == 4
assert abs(f(3) - 9) < 1e-6
assert f(4) in (16, 17)
assert 9 in [f(3)]
assert f(3) in {9: 1}
assert [f(1), f(2)] == [1, 4]
assert f(5) >= 25
assert 25 <= f(5) <= 25
assert max(f(3), 1) == 9
assert round(f(2) - 4, 3) == 0
assert 4 - f(2) == 0
assert f(2) % 3 == 1 and f(2) + 1 == 5
assert {f(2): 1} == {4: 1}
assert sorted([f(3), 1]) == [1, 9]
assert str(f(2)) == "4"
assert not f(3) != 9
assert isinstance(f(2), int) and f(2) == 4
assert type(f(2)) is int and not f(2) - 4"""


def share(program, tests=SQUARES, seconds=10.0, **fields):
    "The share of the tests that a program passes."
    answer = json.dumps({"tests": tests, **fields})
    value, = CodeTests(seconds=seconds, share=True)([program], [Example("q", answer, "c")])
    assert type(value) is float and 0 <= value <= 1
    return value


def plainly(program, tests):
    "The share in this interpreter."
    module = types.ModuleType("solution")
    run = lambda text: exec(compile(text, "solution", "exec"), module.__dict__)
    body, passed, before = ast.parse(tests).body, 0, sys.modules.get("solution")
    sys.modules["solution"] = module
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run(program)
            for statement in body:
                try: run(ast.unparse(statement))
                except BaseException:
                    if isinstance(statement, QUIET): break
                else: passed += not isinstance(statement, QUIET)
    except BaseException: passed = 0
    finally: sys.modules.pop("solution") if before is None else sys.modules.update(solution=before)
    return passed / sum(not isinstance(s, QUIET) for s in body)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_honest_program_is_judged_as_in_one_interpreter(name):
    program, tests = PROGRAMS[name]
    with ThreadPoolExecutor(1) as pool:
        expected = pool.submit(plainly, program, tests).result()  # no event loop of another test
    assert share(program, tests, seconds=60) == expected
    if name not in ("wrong programs",) and not name.startswith("a module that"): assert expected > .4


ALL = "\n".join(f"  def __{n}__(self, *o): return True" for n in "eq ne lt le gt ge contains bool".split())
MATHS = "\n".join(f"  def __{n}__(self, *o): return {{value}}" for n in
                  "sub rsub add radd mod rmod abs round neg mul rmul floordiv pow xor and or truediv iadd".split())
MORE = """
  def __iter__(self): return iter([])
  def __len__(self): return 1
  def __hash__(self): return hash(4)
  def __getattr__(self, name): return lambda *_: True
"""
META = """class Meta(type):
  def __instancecheck__(self, other): return True
  def __subclasscheck__(self, other): return True
"""


def pleasing(base, value, made):
    "A program whose objects are equal to all, contain all, and so on."
    return f"{META}class Any({base}, metaclass=Meta):\n{ALL}\n{MATHS.format(value=value)}{MORE}\nf = {made}\n"


@pytest.mark.parametrize("value", ["0", "self", "0.0", "True"])
@pytest.mark.parametrize("made", ["lambda x: Any()", "type('f', (Any,), {'__init__': lambda self, x: None})"])
def test_an_object_equal_to_everything_passes_nothing(value, made):
    program = pleasing("object", value, made)
    assert plainly(program, SQUARES) > .4
    assert share(program) == 0


@pytest.mark.parametrize("base, of", [
    ("int", "7"), ("float", "7.5"), ("complex", "7j"), ("str", "'q'"), ("bytes", "b'q'"), ("tuple", "(7,)"),
    ("frozenset", "{7}"), ("list", "[7]"), ("dict", "{7: 7}"), ("set", "{7}"), ("bytearray", "b'q'"),
])
def test_neither_does_one_in_the_clothes_of_a_plain_type(base, of):
    "Only the value inside counts; 7 is an int, and 1 modulo 3, and that is all."
    tests = "\n".join(line for line in SQUARES.split("\n") if "%" not in line)
    program = pleasing(base, "0", f"lambda x: Any({of})").replace("  def __iter__(self): return iter([])\n", "")
    assert plainly(program, tests) > .5
    assert share(program, tests) == 0


@pytest.mark.parametrize("program", [
    "class Lie:\n  __class__ = property(lambda self: int)\n  __eq__ = lambda self, other: True\ndef f(x): return Lie()",
    "def f(x): return [Everything()] * 9\nclass Everything:\n  __eq__ = lambda *_: True",
    "class E(BaseException):\n  __eq__ = __hash__ = lambda *_: True\ndef f(x): return E()",
    "def f(x): return NotImplemented", "def f(x): return f", "def f(x): raise AssertionError",
    "def f(x): return type('T', (), {'__eq__': lambda *_: True, '__hash__': lambda *_: 4})",
    "class f:\n  def __new__(cls, x): return cls",
    "from unittest.mock import ANY, MagicMock\ndef f(x): return ANY",
    "from unittest.mock import MagicMock\ndef f(x): return MagicMock()",
    "import itertools\ndef f(x): return itertools.count(1000)", "def f(x): return iter(int, 1)",
    "def f(x): return f(x)", "def f(x): return (yield)",
    "class A:\n  def __getattr__(self, n): return A()\n  def __iter__(self): return self\n"
    "  def __next__(self): return A()\ndef f(x): return A()",
])
def test_odd_results_pass_nothing(program): assert share(program, seconds=4) == 0


@pytest.mark.parametrize("program", [
    "import builtins\nbuiltins.abs = abs = lambda x: 0\nbuiltins.isinstance = isinstance = lambda *_: True\n"
    "builtins.type = type = lambda x: int\nround = str = sorted = max = abs\ndef f(x): return .5",
    "__builtins__['isinstance'] = __builtins__['all'] = lambda *_: True\ndef f(x): return .5",
    "import builtins\nbuiltins.id = lambda x: 1\nbuiltins.getattr = builtins.hasattr = lambda *_: 4\n"
    "def f(x): return .5",
    "import math, unittest, sys\nmath.isclose = lambda *_, **k: True\n"
    "unittest.TestCase.assertEqual = lambda *_: None\nsys.modules['math'] = sys.modules['unittest'] = math\n"
    "def f(x): return .5",
    "import sys\nsys.modules['json'] = sys.modules['struct'] = sys.modules['os'] = None\ndef f(x): return .5",
    "import struct, os\nstruct.pack = lambda *_: b''\nos.write = lambda *_: 1\ndef f(x): return .5",
])
def test_what_a_program_replaces_is_not_what_the_tests_use(program):
    tests = SQUARES + ("\nassert math.isclose(f(2), 4)\nimport math\nassert math.isclose(f(2), 4)\nimport unittest\n"
                       "t = unittest.TestCase()\nt.assertEqual(f(2), 4)")
    assert share(program, tests, seconds=4) == 0


@full  # some of them kill all processes that they can reach
@pytest.mark.parametrize("act",
    ["os._exit(0)", "sys.exit(0)", "os.kill(os.getpid(), 9)", "os.kill(os.getppid(), 9)", "os.kill(1, 9)",
        "os.kill(-1, 9)", "os.abort()", "raise SystemExit(0)",
                                 "raise KeyboardInterrupt", "os.closerange(0, 999)",
                                 "os.execv(sys.executable, [sys.executable, '-c', ''])",
                                 "sys.setrecursionlimit(10 ** 9), f(1)",
                                 "atexit.register(os._exit, 0), sys.exit(0)",
                                 "signal.signal(15, lambda *_: os._exit(0)), os.kill(0, 15)"])
@pytest.mark.parametrize("where", ["def f(x):\n  {}\n", "def f(x): return 4\n{}\n"], ids=["called", "loaded"])
def test_leaving_early_passes_nothing(act, where):
    tests = "assert f(2) == 4\nassert f(3) == 9\ntry: f(1)\nexcept BaseException: pass"
    found = share("import atexit, os, signal, sys\n" + where.format(act), tests, seconds=4)
    assert found <= 2 / 3 if "return 4" in where or act.startswith("raise") else found in (0, 1 / 3)
    assert share("import atexit, os, signal, sys\n" + where.format(act), "assert f(2) == 5", seconds=4) == 0


INSIDE = (
    "import gc, os, sys, threading\npeer, = [o for o in gc.get_objects() if type(o).__name__ == 'Peer']\n"
    "launcher = sys.modules['launcher']\n")

@pytest.mark.parametrize("body", [
    "def f(x):\n  for h in range(999):\n    for n in range(40):\n      try: os.write(h, b'passed %d\\n' % n)\n"
    "      except OSError: break\n",
    "def f(x): return os.write(peer.sink, b'passed 1\\npassed 2\\n') and .5",
    "def f(x): peer.send(b'=', b'no value')", "def f(x): peer.send(b'!', b'o\\0\\0\\0\\0')",
    "def f(x): os.write(peer.sink, b'=' + b'\\xff' * 9)",
    "def f(x): peer.send(b'=', (b'[' + (1).to_bytes(4, 'little')) * 200_000)",
    "def f(x): peer.send(b'=', b'(' + (3).to_bytes(4, 'little') + b'[' + (3_000_000).to_bytes(4, 'little') + "
    "(b'[' + bytes(4)) * 3_000_000)",
    "def f(x):\n  for _ in range(99): peer.send(b'?', b'')\n  return .5",
    "threading.Thread(target=lambda: [os.write(peer.sink, os.urandom(99)) for _ in range(10 ** 9)], "
    "daemon=True).start()\ndef f(x): return .5",
    "for n in ('Writer', 'Reader', 'Peer', '_plain', '_named'): setattr(launcher, n, None)\ndef f(x): return .5",
    "class Fake:\n  def __getattr__(self, n): return lambda *_: True\ndef f(x):\n"
    "  launcher.Writer.put = lambda self, value: self.out.extend(b'o' + bytes(4))\n  return .5",
    "def f(x): return [[] for _ in range(3_000_000)]", "def f(x): return 'x' * LARGE", "def f(x): return 1 << 10 ** 9",
    "def f(x):\n  a = []\n  for _ in range(100_000): a = [a]\n  return a",
    "def f(x): raise type('E', (ValueError,), {'args': property(lambda s: 1 / 0)})",
    "def f(x):\n  e = ValueError()\n  e.args = (e,)\n  raise e",
], ids=range(17))
def test_a_program_that_speaks_the_protocol_passes_nothing(body):
    assert share(INSIDE + body.replace("LARGE", str(LARGEST + 1)),
        "assert f(2) == 4\nassert f(3) == 9\nassert f(4) == 16", seconds=3) == 0


def test_a_program_that_answers_for_itself_earns_what_it_answers():
    "Three threads that send the value True all the time: it is compared as any other."
    body = (
        "\nw = launcher.Writer(peer)\nw.put((True, None, ''))\ndef go():\n  while True: peer.send(b'=', w.out)\n"
        "threading.Thread(target=go, daemon=True).start()\ndef f(x): return 0\n")
    assert share(INSIDE + body, "assert f(2) == 4\nassert f(3) == 9", seconds=3) == 0


MARK = "mark_of_the_tests_" + "x" * 3
SPY = """
mark = "mark_of_" + "the_tests_" + "x" * 3
import gc, os, sys
def looks(value): return isinstance(value, (str, bytes, dict, list, tuple)) and mark in repr(value)
def f(x):
  found, frame = [], sys._getframe()
  while frame:
    names = [*frame.f_locals.items(), *frame.f_globals.items()]
    found += [k for k, v in names if k not in ("mark", "peer") and k[:1] != "_" and looks(v)]
    frame = frame.f_back
  objects = [o for o in gc.get_objects() if o is not globals() and o is not found and looks(o)]
  found += [type(o) for o in objects if mark not in repr(found)]
  for path in ["/proc/self/mem", "/proc/self/maps", "/proc/self/fd/0", "/proc/1/fd", "/proc/1/mem", "/proc/1/environ",
               f"/proc/{os.getppid()}/cmdline", "/dev/stdin", "/dev/fd/0"]:
    try: found.append(open(path, "rb").read(1) and path)
    except OSError: pass
  for n in range(64):
    try: found.append(mark.encode() in os.read(n, 9) and n) if n not in (peer.source, peer.sink) else 0
    except OSError: pass
  return sorted(map(str, filter(None, found)))
"""

@full
@each_way
def test_a_program_finds_no_trace_of_its_tests(without):
    tests = [(False, f"secret = {MARK!r}"), (True, f"assert f(1) == [], {MARK!r}")]
    assert judge_code(INSIDE + SPY, tests, seconds=20, without=without).passed == 1


@full
@each_way
def test_a_program_has_two_handles_and_no_way_to_another_process(without):
    program = INSIDE + """
import ctypes
def handles(): return [n for n in range(999) if is_open(n)]
def is_open(n):
  try: os.fstat(n)
  except OSError: return False
  return True
def reach():
  library = ctypes.CDLL(None, use_errno=True)
  done = []
  for pid in (1, os.getppid(), os.getppid() + 1):
    for call in ((101, 16, pid, 0, 0), (310, pid, 0, 0, 0, 0, 0), (311, pid, 0, 0, 0, 0, 0), (438, 3, 0, 0)):
      if library.syscall(*map(ctypes.c_long, call)) >= 0 or ctypes.get_errno() not in (1, 3, 9): done.append(call)
  return done
def kill():
  done = []
  for pid in (1, os.getppid()):
    try: done.append(os.kill(pid, 9))
    except OSError: pass
  return 4
"""
    tests = [(True, "assert len(handles()) == 5 and handles()[:3] == [0, 1, 2]"), (True, "assert kill() == 4"),
        (True, "assert kill() == 5")]
    if os.uname().machine == "x86_64": tests.append((True, "assert reach() == [], reach()"))
    assert judge_code(program, tests, seconds=20, without=without).passed == len(tests) - 1


@full
@each_way
def test_programs_are_judged_in_every_way(without):
    found = judge_code("def f(x): return x * x", [(True, "assert f(2) == 4"), (True, "assert f(2) == 5")], seconds=20,
        without=without)
    assert (found.passed, found.reason) == (1, "")
    assert not {*without} & {*found.steps} and "seccomp" in found.steps


@full
def test_both_sides_are_confined():
    "The tests come from a data set: they are kept in, too."
    alone = f"import os\nassert not os.path.exists('/etc/passwd') and os.getuid() not in (0, {os.getuid()})"
    tests = [(True, alone), (True, "import socket\nsocket.socket()"), (True, "import os\nos.fork()"),
             (True, "assert f() != os.getuid() or os.getuid() == 65534")]
    found = judge_code("import os\ndef f(): return os.getuid()", [(False, "import os"), *tests], seconds=20)
    assert found.passed == 2


def test_a_machine_that_permits_little_still_has_two_processes(monkeypatch):
    everything = ("namespaces", "view", "user", "limits", "landlock", "seccomp", "weak", "bare", "tied")
    monkeypatch.setattr(sandbox_module, "_unusable", lambda: everything)
    with pytest.warns(UserWarning, match="without isolation of network, files, processes, user, limits"):
        found = judge_code("import os\ndef f(x): return os.getpid()",
            [(True, "assert f(1) > 1"), (True, "import os\nassert f(1) != os.getpid()"), (True, "assert f(1) == 1")])
    assert found.passed == 2
    killer = "import os\ndef f(x): os.kill(os.getppid(), 9)"
    with pytest.warns(UserWarning): assert judge_code(killer, [(True, "f(1)")]).passed == 0


GRAB = """
import sys
peer = [o for o in __import__("gc").get_objects() if type(o).__name__ == "Peer"][0]
def f(given):
  out = []
  def ask(*request):
    try: out.append(peer.ask(*request))
    except BaseException as error: return
  hidden = "__globals__ __code__ __closure__ __self__ __class__ __dict__ gi_frame __init__ func".split()
  for name in hidden: ask("get", given, name)
  for request in (("call", int, ("3",), {}), ("get", 0, "real"), ("get", "{0.__globals__}", "format"), ("load",),
                  ("name", "f"), ("names",), ("plain", given), ("wait", given), ("share", []), ("own", given),
                  ("special", given, "__getattribute__", ("__globals__",)), ("special", given, "__class__", ()),
                  ("call", type, (given,), {}), ("enter", 1, given), ("set", given, "__code__", 1),
                  ("set", given, "x", 1), ("construct", int, (), {}), ("nothing",), (1,), ()): ask(*request)
  return out
"""

def test_a_program_gets_nothing_out_of_an_object_of_the_tests():
    tests = (
        "secret = 'hidden'\ndef helper(x=secret): return secret and 1\nassert f(helper) == []\n"
        "assert f(i for i in [secret]) == []\nimport math\nassert f([].append) == []\nassert f(math) == []")
    assert share(GRAB, tests) == .75  # a module is refused


def test_an_object_of_the_tests_shows_what_is_public():
    program = (
        "def f(o): return o.n, o.double(4), hasattr(o, '_hidden'), hasattr(o, '__dict__'), len(o), o[2], list(o), "
        "o + 1\n"
        "def g(o): o.n = 5")
    tests = """class O:
    n, _hidden = 3, 1
    def double(self, x): return 2 * x
    def __len__(self): return 7
    def __getitem__(self, i): return i
    def __iter__(self): return iter("ab")
    def __add__(self, i): return i + 1
o = O()
assert f(o) == (3, 8, False, False, 7, 2, ["a", "b"], 2)
g(o)
assert o.n == 5"""
    assert share(program, tests) == 1


NODES = """from __future__ import annotations
class Node:
    def __init__(self, value=0, next: Node | None = None): self.value, self.next = value, next
    def __eq__(self, other): return isinstance(other, Node) and (self.value, self.next) == (other.value, other.next)
    def values(self):
        found, node = [], self
        while node: found, node = [*found, node.value], node.next
        return found

"""
REVERSE = (
    "def reverse(head):\n  last = None\n  while head: head.next, last, head = last, head, head.next\n  return last\n")
LISTS = (
    "first = Node(1, Node(2, Node(3)))\nassert reverse(first).values() == [3, 2, 1]\nassert first.values() == [1]\n"
    "assert reverse(Node(1, Node(2))) == Node(2, Node(1))\nassert reverse(None) is None")


@pytest.mark.parametrize("program, right", [
    (REVERSE, 1), (NODES + REVERSE, 1), (REVERSE.replace("last, head =", "last, head = head, last #"), None),
    ("def reverse(head): return head", 0),
    ("class Node:\n  __eq__ = lambda *_: True\n  values = lambda self: Node()\n  __init__ = lambda self, *_: None\n"
     "  value = next = None\ndef reverse(head): return Node()", 0),
    ("def reverse(head):\n  if head: head.values = lambda: [3, 2, 1]\n  return head", 0)])
def test_classes_of_the_prefix_are_the_judges(program, right):
    tests = "\n".join(LISTS.split("\n")[:-1])
    found = share(program, tests, prefix=NODES)
    if right is not None: assert found == right


def test_long_lists_and_loops_of_objects():
    tests = "assert len(build(1900).values()) == 1900\nn = Node(1)\nassert loop(n) is n and n.next is n"
    program = (
        "def build(n):\n  head = None\n  for i in range(n): head = Node(i, head)\n  return head\ndef loop(n):\n"
        "  n.next = n\n  return n")
    assert share(program, tests, prefix=NODES, seconds=30) == 1


HELPERS = (
    "import math\nfrom dataclasses import dataclass\nfrom enum import Enum\n\ndef double(x): return 2 * x\n\n"
    "@dataclass(frozen=True)\nclass P:\n    x: int\n\nclass C(Enum):\n    R = 1\n    G = 2\n\n")

@pytest.mark.parametrize("program, tests, right", [
    ("def f(x): return double(x) + 1", "assert f(2) == double(2) + 1\nassert double(3) == 6", 1),
    ("def double(x): return 0\ndef f(x): return 1", "assert f(2) == double(2) + 1", 0),
    ("double = abs = lambda *_: 0\nclass math:\n  isclose = lambda *_: True\ndef f(x): return 0",
    "assert math.isclose(f(1), 3)\nassert abs(f(1) - 3) < 1\nassert f(2) == 5", 0),
    ("def f(p): return P(p.x + 1)\ndef g(c): return C.G if c is C.R else C.R\ndef h(): return {P(1): [C.R]}",
    "assert f(P(1)) == P(2)\nassert g(C.R) is C.G\nassert h() == {P(1): [C.R]}", 1),
    ("def f(p): return P(0)\ndef g(c): return 'G'\nclass P:\n  __eq__ = lambda *_: True\n  __init__ = lambda *_: None",
    "assert f(P(1)) == P(2)\nassert g(C.R) is C.G", 0),
])
def test_helpers_of_the_prefix_are_trusted(program, tests, right): assert share(program, tests, prefix=HELPERS) == right


@pytest.mark.parametrize("prefix, completion, tests", [
    ("class A:\n    def __init__(self, n): self.n = n\n    def get(self):\n", "        return self.n",
    "assert A(3).get() == 3"),
    ("class A:\n    def __init__(self, n): self.n = n\n    def get(self):\n        'The number.'\n",
    "        return self.n", "assert A(3).get() == 3"),
    ("import functools\n@functools.cache\ndef f(n):\n", "    return n + 1",
    "assert f(1) == 2 and functools.reduce(max, [1, 2]) == 2"),
    ("def f(x): return 0\n", "def f(x): return x", "assert f(1) == 1"),
    ("def f(x): return x + 1\n", "", "assert f(1) == 2"),
    ("from typing import List\n\n", "def f(x: List): return x", "assert f([1]) == [1]"),
])
def test_what_a_prefix_leaves_open_is_the_programs(prefix, completion, tests):
    assert share(completion, tests, prefix=prefix) == 1


def test_functions_with_the_name_of_a_builtin():
    total = "def sum(a, b): return a * b\n"
    assert share(total, "assert sum(2, 3) == 6\nassert sum(1, 1) == 1\nassert abs(sum(2, 2)) == 4") == 1
    assert share(total + "class S:\n  __eq__ = lambda *_: True\nset = abs = lambda x: S()",
        "assert abs(sum(2, 3)) == 7\nassert sum(2, 3) == 7") == 0
    assert share("def sorted(a): return a[::-1]",
        "assert set(sorted([1, 2])) == {1, 2}\nassert candidate([1, 2]) == [2, 1]", entry_point="sorted") == 1
    assert "entry_point has to name" in check_answer("code", json.dumps({"tests": "assert set(sum(2, 3)) == set([6])"}))
    assert share("from solution2 import x\n" if False else "def f(): return 1\nlen = lambda x: 5",
        "from solution import *\nassert f() == 1 and len([]) == 0") == 1


@pytest.mark.parametrize("prefix",
    ["", "from __future__ import annotations\nimport os\n", '"""A module."""\nimport os\n',
        "# é\nfrom typing import List\n\n"])
@pytest.mark.parametrize("program",
    ["from __future__ import annotations\ndef f(x: Zip): return 1",
        "# note\n'''Doc'''\nfrom __future__ import (annotations,\n  division)\nimport os\ndef f(x: Zip): return 1",
                                     "x = 1; from __future__ import annotations; y = 2\ndef f(a: Zip): return y - x"])
def test_future_imports_come_first(prefix, program):
    assert share(program, "assert f(1) == 1\nassert 'Zip' in f.__annotations__.values()", prefix=prefix) == 1


def test_bad_future_imports_fail():
    assert share("from __future__ import nothing\ndef f(x): return 1", "assert f(1) == 1") == 0
    assert share("def f(x): return (\nfrom __future__ import annotations", "f(1)") == 0


def test_objects_that_the_tests_make_may_meet_their_values():
    "Arithmetic and order, if tests take attributes of the class's objects; never equality, never results of functions."
    vector = (
        "class V:\n  def __init__(self, x): self.x = x\n  def __mul__(self, k): return V(self.x * k)\n"
        "  def __lt__(self, k): return self.x < k\n  def __eq__(self, k): return True\ndef f(x): return V(x)\n")
    assert share(vector, "v = V(2)\nassert v.x == 2\nassert (v * 3).x == 6\nassert v < 3") == 1
    assert share(vector, "v = V(2)\nassert v.x == 3\nassert v == 2\nassert f(2) < 3\nassert f(2) * 3 == 6\n"
                         "assert 2 == v") == 0


HOOKS = """class Yes:
  __array_priority__ = 1e9
  def __array_ufunc__(self, *_, **k): return self
  def __array_function__(self, *_, **k): return self
  def all(self): return True
  __bool__ = __eq__ = __sub__ = __rsub__ = lambda *_: True
def f(x): return Yes()
"""

def test_numpy_does_not_ask_an_object_of_the_program():
    tests = (
        "import numpy as np\nassert (f(3) == np.array([0, 2, 4])).all()\nassert (np.array([0, 2, 4]) == f(3)).all()\n"
        "assert np.allclose(f(3), [0, 2, 4])\nassert np.isclose(f(1), 4)\nnp.testing.assert_array_equal(f(3), [0, 2])")
    answer = json.dumps({"tests": tests})
    assert CodeTests(seconds=60, share=True, packages=True)([HOOKS], [Example("q", answer, "c")]) == [0]


def test_numpy_values_are_compared_as_arrays():
    program = (
        "import numpy as np\ndef f(n): return np.arange(n) * 2\ndef mean(x): return x.mean()\n"
        "def half(x): return np.float32(x / 2)\ndef flat(x): x[0] = 5\n"
        "def odd(): return np.array([{}, 1], dtype=object)")
    tests = (
        "import numpy as np\nassert (f(3) == np.array([0, 2, 4])).all() and f(3).dtype == np.int64\n"
        "assert mean(np.array([[1., 2.]])) == 1.5\nassert half(3) == 1.5 and isinstance(half(3), np.float32)\n"
        "assert np.allclose(f(2), [0, 2])")
    answer = json.dumps({"tests": tests + "\nassert np.allclose(f(2), [0, 3])"})
    assert CodeTests(seconds=60, share=True, packages=True)([program], [Example("q", answer, "c")]) == [.8]


def test_a_module_that_the_tests_do_not_import_is_not_the_programs():
    program = "import random as rnd\nclass np:\n  allclose = lambda *_: True\nmath = np\ndef f(x): return 0"
    assert share(program, "assert np.allclose(f(1), 1)\nassert math.allclose(f(1), 1)\nassert rnd.random() < 2") == 0


def test_tests_that_inspect_a_program_fail_alone():
    assert share("def f(x): return 1",
        "import inspect\nassert f(1) == 1\nassert 'return' in inspect.getsource(f)\n"
        "assert f(2) == 1") == pytest.approx(2 / 3)


def test_results_are_floats_in_order_for_many_programs():
    tests = json.dumps({"tests": "assert f(1) == 1\nassert f(2) == 2"})
    programs = [f"def f(x): return {('x', '1', '0')[i % 3]}" for i in range(9)]
    assert CodeTests(share=True)(programs, [Example("q", tests, "c")] * 9) == [1, .5, 0] * 3 and CodeTests()([],
        []) == []


# ---------------------------------------------------------------- the wire

PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.integers(-2 ** 300,
    2 ** 300) | st.floats() | st.complex_numbers() | st.text() | st.binary() | st.just(...),
                     lambda inner: st.lists(inner) | st.tuples(inner,
                         inner) | st.dictionaries(st.text() | st.integers(),
                             inner) | st.sets(st.integers()) | st.frozensets(st.text()), max_leaves=30)


def sent(value):
    writer = Writer(None)
    writer.put(value)
    return Reader(None, bytes(writer.out)).get()


def alike(a, b):
    "Equal in value and type, with nan equal to itself."
    if type(a) is not type(b): return False
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict): return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, float): return a == b and math.copysign(1, a) == math.copysign(1, b) or a != a and b != b
    return a == b or isinstance(a, complex) and repr(a) == repr(b)


@settings(deadline=None, max_examples=200)
@given(PLAIN)
def test_plain_values_arrive_as_they_are(value): assert alike(sent(value), value)


def test_shared_and_circular_containers_keep_their_shape():
    row = [1]
    got = sent([row, row, {"row": row}])
    assert got[0] is got[1] is got[2]["row"]
    row.append(row)
    got = sent(row)
    assert got[1] is got and sent(range(1, 9, 2)) == range(1, 9, 2) and sent(slice(1, None)) == slice(1,
        None) and sent("\ud800") == "\ud800"


@pytest.mark.parametrize("data",
    [b"", b"i", b"i\4\0\0\0", b"[\xff\xff\xff\xff", b"r\0\0\0\0", b"o\x09\0\0\0", b"{\1\0\0\0[\0\0\0\0o\0\0\0\0",
        b"<\1\0\0\0[\0\0\0\0", b"s\1\0\0\0\xff", b"?", b"f12",
                                  b"*\0\0\0\0", b"-\1\0\0\0s\1\0\0\0x"])
def test_bytes_that_are_no_value_are_an_exception(data):
    with pytest.raises(Exception): Reader(None, data).get()


def test_damaged_messages_never_do_more_than_fail():
    "Random bytes, and real messages with a byte changed, read by a judge without a program: a value, or an exception."
    rng = random.Random(0)
    source, sink = os.pipe()
    os.close(sink)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    peer = Peer(source, nowhere, True)
    writer = Writer(None)
    writer.put([1, "two", {3.0: (None, True)}, {4}, [[]], b"5", 6j, range(7), "fractions.Fraction", ("object", 1, 2),
        ("name", "int")])
    for n in range(4000):
        data = bytearray(writer.out) if n % 2 else bytearray(rng.randbytes(rng.randrange(1, 60)))
        for _ in range(rng.randrange(1,
            4)): data[rng.randrange(len(data))] = rng.choice(b"oifcsby[<{(>-:r*+\0\1\2\3" + rng.randbytes(4))
        try: Reader(peer, bytes(data)).get()
        except (Exception, peers_module.Gone): pass
    os.close(source), os.close(nowhere)


def test_only_types_that_do_nothing_are_sent_by_name():
    reader = Peer(-1, -1, True)
    assert [reader.get_other("name", n) for n in ("int", "ValueError", "NoneType")] == [int, ValueError, type(None)]
    for name in ("eval", "exec", "open", "type", "super", "classmethod", "map", "__import__", "os", "Peer",
        "memoryview"):
        with pytest.raises(ValueError, match="by name"): reader.get_other("name", name)
    for name in ("os.system", "subprocess.Popen", "builtins.eval", "collections.namedtuple"):
        with pytest.raises(ValueError, match="none of the library"): values_module._library_class(name)
