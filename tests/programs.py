"Honest programs with tests: the judge and an ordinary interpreter have to agree on each, also on the tests that fail."
import textwrap

PROGRAMS = {}


def task(name, *texts): PROGRAMS[name] = tuple(textwrap.dedent(text).strip("\n") + "\n" for text in texts)


task("gcd", """
    def gcd(a, b): return gcd(b, a % b) if b else a
""", """
    assert gcd(12, 18) == 6
    assert gcd(7, 0) == 7
    assert gcd(2 ** 70, 2 ** 65) == 2 ** 65
    assert gcd(4, 6) == 3
""")
task("primes", """
    def primes(n): return [p for p in range(2, n) if all(p % q for q in range(2, p))]
""", """
    assert primes(12) == [2, 3, 5, 7, 11] and type(primes(3)) is list
    assert set(primes(8)) == {2, 3, 5, 7} and 7 in primes(9) and 9 not in primes(10)
    assert primes(5) == (2, 3)
    assert sum(primes(10)) == 17 and max(primes(10)) == 7 and len(primes(2)) == 0
""")
task("floats", """
    import math
    def mean(values): return sum(values) / len(values)
    def nan(): return math.nan
    def small(): return -0.0
""", """
    import math
    assert abs(mean([1, 2, 4]) - 7 / 3) < 1e-12 and round(mean([1, 2]), 1) == 1.5
    assert mean([.1, .2]) == .15000000000000002
    assert mean([.1, .2]) == .15
    assert nan() != nan() and math.isnan(nan()) and math.copysign(1, small()) == -1
    assert mean([10 ** 400, 1]) > 0
    assert isinstance(mean([2]), float) and mean([2]) == 2
""")
task("strings", r"""
    def shout(text): return text.upper() + "!"
    def odd(): return "\ud800\x00é"
    def lines(): return "a\nb\r\n"
""", r"""
    assert shout("é") == "É!" and shout("a").startswith("A") and shout("a")[0] in "ABC"
    assert odd() == "\ud800\x00é" and len(odd()) == 3
    assert lines().splitlines() == ["a", "b"]
    assert f"{shout('x'):>4}" == "  X!"
    assert shout("ok") == "OK"
""")
task("nested containers", """
    def table(): return {"a": [1, (2, {3})], ("k", 1): {frozenset([4]): b"x"}, None: [[], {}, set(), ()]}
""", """
    assert table() == {"a": [1, (2, {3})], ("k", 1): {frozenset([4]): b"x"}, None: [[], {}, set(), ()]}
    assert list(table()) == ["a", ("k", 1), None] and isinstance(table()["a"][1], tuple)
    assert table()["a"][1] == [2, {3}]
    assert type(table()[None][2]) is set
""")
task("order of keys", """
    def count(words):
        found = {}
        for word in words: found[word] = found.get(word, 0) + 1
        return found
""", """
    assert list(count("banana").items()) == [("b", 1), ("a", 3), ("n", 2)]
    assert count("") == {}
    assert count("aa") == {"a": True + 1}
""")
task("constants", """
    def kind(n): return [None, True, False, ..., NotImplemented, 0, 1][n]
""", """
    assert kind(0) is None and kind(1) is True and kind(2) is False and kind(3) is ... and kind(4) is NotImplemented
    assert kind(5) is not False and kind(5) == False
    assert kind(6) is True
""")
task("library values", """
    from collections import Counter, OrderedDict, defaultdict, deque
    from datetime import date, datetime, timedelta, timezone
    from decimal import Decimal
    from fractions import Fraction
    def half(): return Fraction(1, 2)
    def price(): return Decimal("1.10")
    def when(): return datetime(2024, 2, 29, 12, tzinfo=timezone.utc)
    def span(): return date(2024, 3, 1) - date(2024, 2, 28)
    def letters(text): return Counter(text)
    def last(items): return deque(items, maxlen=2)
    def groups(words):
        found = defaultdict(list)
        for w in words: found[len(w)].append(w)
        return found
    def ordered(): return OrderedDict(b=1, a=2)
    def later(d): return d + timedelta(days=1)
""", """
    from collections import Counter, deque
    from datetime import date, datetime, timedelta, timezone
    from decimal import Decimal
    from fractions import Fraction
    assert half() == Fraction(1, 2) == 0.5 and half() + half() == 1
    assert str(price()) == "1.10" and price() == Decimal("1.1")
    assert when() == datetime(2024, 2, 29, 12, tzinfo=timezone.utc) and when().weekday() == 3
    assert span() == timedelta(days=2) and span().days == 2
    assert letters("aab") == Counter(a=2, b=1) and letters("x").most_common(1) == [("x", 1)]
    assert last([1, 2, 3]) == deque([2, 3]) and last([]).maxlen == 2
    assert groups(["a", "bb", "c"]) == {1: ["a", "c"], 2: ["bb"]}
    assert groups([])[5] == []
    assert list(ordered()) == ["b", "a"]
    assert later(date(2023, 12, 31)) == date(2024, 1, 1)
    assert half() == Decimal("0.5")
""")
task("many kinds of numbers", """
    def power(x, n): return x ** n
    def halves(x): return divmod(x, 2)
    def span(a, b): return range(a, b)
""", """
    assert power(3, 200) == 3 ** 200 and power(2j, 2) == -4 and power(2, -1) == .5 and power(True, 3) == 1
    assert halves(-7) == (-4, 1)
    assert span(2, 5) == range(2, 5) and list(span(0, 3)) == [0, 1, 2] and 3 in span(1, 4)
    assert power(10, 5000) == 10 ** 5000
    assert power(0, 0) == 0
""")
task("large results", """
    def squares(n): return [i * i for i in range(n)]
    def text(n): return "ab" * n
    def deep(n):
        found = []
        for _ in range(n): found = [found]
        return found
""", """
    assert squares(60_000)[-1] == 59_999 ** 2 and len(squares(60_000)) == 60_000
    assert text(300_000).count("a") == 300_000
    assert str(deep(300)) == "[" * 301 + "]" * 301
    assert sum(squares(1000)) == 332833500
""")
task("recursion", """
    import functools
    @functools.lru_cache(None)
    def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
    def forever(n): return forever(n + 1)
    def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
""", """
    assert fib(90) == 2880067194370816120
    try:
        forever(0)
        assert False
    except RecursionError: pass
    assert depth(400) == 400
    assert fib.cache_info().misses == 91
    assert all(fib(i + 2) == fib(i + 1) + fib(i) for i in range(20))
""")
task("exceptions", """
    class Empty(Exception): pass
    class Refused(Empty, ValueError):
        def __init__(self, text, code):
            super().__init__(text)
            self.code = code
    def check(x):
        if x is None: raise Empty
        if x < 0: raise Refused("negative", 7)
        return {0: "zero"}[x]
""", """
    def caught(kind, *arguments):
        try: check(*arguments)
        except kind as error: return error
        return None
    assert isinstance(caught(Empty, None), Empty) and caught(Empty, None).args == ()
    assert caught(ValueError, -1).code == 7 and str(caught(Empty, -1)) == "negative"
    assert caught(LookupError, 3).args == (3,) and isinstance(caught(KeyError, 3), KeyError)
    assert caught(TypeError, "x") is not None
    assert caught(ValueError, 0) is None and check(0) == "zero"
    assert issubclass(Refused, ValueError) and not issubclass(Empty, ValueError)
    assert caught(ValueError, None) is None
    assert check(1) == "one"
""")
task("exceptions as values", """
    def error(): return ValueError("x", 1)
    def kind(): return KeyError
    def chained():
        try: return 1 / 0
        except ZeroDivisionError as e: raise RuntimeError("outer") from e
""", """
    assert isinstance(error(), ValueError) and error().args == ("x", 1)
    assert kind() is KeyError and issubclass(kind(), LookupError)
    try: chained()
    except RuntimeError as e: assert str(e) == "outer"
    assert error() == ValueError("x", 1)
""")
task("unittest", """
    def double(x): return x * 2
    def fail(): raise LookupError("no")
""", """
    import io, unittest
    class Tests(unittest.TestCase):
        def test_values(self):
            self.assertEqual(double(2), 4)
            self.assertAlmostEqual(double(.1), .2)
            self.assertListEqual(double([1]), [1, 1])
            self.assertIn(double(1), (2, 3))
        def test_errors(self):
            with self.assertRaises(LookupError) as context: fail()
            self.assertEqual(str(context.exception), "no")
            self.assertRaises(TypeError, double)
    done = unittest.TextTestRunner(io.StringIO()).run(unittest.defaultTestLoader.loadTestsFromTestCase(Tests))
    assert done.testsRun == 2
    assert done.wasSuccessful()
""")
task("generators", """
    def count(n):
        for i in range(n):
            got = yield i
            if got: yield got * 2
    def endless():
        i = 0
        while True:
            yield i
            i += 1
    def closing(log):
        try: yield 1
        finally: log.append("closed")
""", """
    import itertools
    assert list(count(4)) == [0, 1, 2, 3] and sum(count(5)) == 10 and sorted(count(3), reverse=True) == [2, 1, 0]
    it = count(3)
    assert next(it) == 0 and it.send(5) == 10 and next(it) == 1 and iter(it) is it
    assert next(count(0), None) is None
    assert list(itertools.islice(endless(), 3)) == [0, 1, 2] and dict(zip("ab", endless())) == {"a": 0, "b": 1}
    assert count(2) == [0, 1]
    assert hasattr(count(1), "__next__") and not hasattr([], "__next__")
    first, *rest = count(3)
    assert (first, rest) == (0, [1, 2])
    assert max(count(3)) == 2 and any(x == 2 for x in count(3))
""")
task("arguments that change", """
    def append(items, value): items.append(value)
    def clean(d):
        d.pop("x", None)
        d["new"] = [1]
    def grow(s): s |= {9}
    def inner(rows): rows[0].append(5)
    def first(buffer): buffer[0] = 65
    def rotate(d): d.rotate(1)
    def both(a, b):
        a.append(1)
        return b
    def same(x): return x
    def bubble(a):
        for i in range(len(a)):
            for j in range(len(a) - 1 - i):
                if a[j] > a[j + 1]: a[j], a[j + 1] = a[j + 1], a[j]
""", """
    from collections import deque
    items = [3, 1]
    append(items, 2)
    assert items == [3, 1, 2]
    bubble(items)
    assert items == [1, 2, 3] and same(items) is items
    d = {"x": 1}
    clean(d)
    assert d == {"new": [1]}
    s = {1}
    grow(s)
    assert s == {1, 9}
    rows = [[1], 2]
    kept = rows[0]
    inner(rows)
    assert rows == [[1, 5], 2] and kept == [1, 5] and rows[0] is kept
    buffer = bytearray(b"xy")
    first(buffer)
    assert buffer == b"Ay"
    q = deque([1, 2])
    rotate(q)
    assert q == deque([2, 1])
    assert both(items, items) is items and items[-1] == 1
    loop = [1]
    loop.append(loop)
    assert same(loop) is loop and same(loop)[1] is loop
    t = ([1],)
    append(t[0], 2)
    assert t == ([1, 2],)
    assert bubble([2, 1]) is None
""")
task("callbacks", """
    def apply(f, *arguments, **named): return f(*arguments, **named)
    def order(items, key): return sorted(items, key=key)
    def compose(f, g): return lambda x: f(g(x))
    def collect(visit, n):
        for i in range(n): visit(i)
    def convert(text, kind): return kind(text), isinstance(text, kind)
    def twice(items): return [2 * i for i in items]
    def fold(f, items, start):
        for item in items: start = f(start, item)
        return start
""", """
    import math, operator
    assert apply(lambda x, y=1: x + y, 3, y=4) == 7
    assert order([3, 1, 2], lambda x: -x) == [3, 2, 1] and order(["bb", "a"], len) == ["a", "bb"]
    assert compose(str, math.sqrt)(4.0) == "2.0" and compose(lambda x: x + 1, abs)(-2) == 3
    seen = []
    collect(seen.append, 3)
    assert seen == [0, 1, 2]
    assert convert("12", int) == (12, False) and convert("a", str) == ("a", True)
    assert twice(i for i in range(3)) == [0, 2, 4] and twice(map(abs, [-1])) == [2]
    assert fold(operator.add, [1, 2, 3], 0) == 6 and fold(max, [3, 9, 2], 0) == 9
    assert order([[2, "b"], [1, "c"]], operator.itemgetter(0)) == [[1, "c"], [2, "b"]]
    assert apply(len) == 0
""")
task("errors in callbacks", """
    def guard(f):
        try: return f()
        except ValueError as error: return "caught " + str(error)
    def through(f): return f()
    def retry(f, n):
        for i in range(n):
            try: return f()
            except OSError:
                if i == n - 1: raise
""", """
    class Mine(Exception): pass
    calls = []
    def bad(): raise ValueError("b")
    def mine(): raise Mine("m", 1)
    def flaky():
        calls.append(1)
        if len(calls) < 3: raise OSError("again")
        return "done"
    assert guard(bad) == "caught b"
    try:
        through(mine)
        assert False
    except Mine as error: assert error.args == ("m", 1)
    assert retry(flaky, 5) == "done" and len(calls) == 3
    assert guard(mine) is None
""")
task("decorators", """
    import functools
    def memo(f):
        known = {}
        @functools.wraps(f)
        def wrapper(x):
            if x not in known: known[x] = f(x)
            return known[x]
        return wrapper
    def counted(f):
        def wrapper(*arguments):
            wrapper.calls += 1
            return f(*arguments)
        wrapper.calls = 0
        return wrapper
    class times:
        def __init__(self, n): self.n = n
        def __call__(self, f): return lambda *a: [f(*a) for _ in range(self.n)]
""", """
    calls = []
    @memo
    def slow(x):
        calls.append(x)
        return x * x
    assert slow(3) == 9 and slow(3) == 9 and calls == [3] and slow.__name__ == "slow"
    @counted
    def add(a, b): return a + b
    assert add(1, 2) == 3 and add(1, 1) == 2 and add.calls == 2
    @times(3)
    def hi(x): return "hi " + x
    assert hi("a") == ["hi a"] * 3
    assert add.calls == 3
""")
task("classes", """
    class Vector:
        def __init__(self, x, y): self.x, self.y = x, y
        def __eq__(self, other): return isinstance(other, Vector) and (self.x, self.y) == (other.x, other.y)
        def __hash__(self): return hash((self.x, self.y))
        def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
        def __mul__(self, k): return Vector(self.x * k, self.y * k)
        __rmul__ = __mul__
        def __repr__(self): return f"Vector({self.x}, {self.y})"
        def __len__(self): return 2
        def __iter__(self): return iter((self.x, self.y))
        def __getitem__(self, i): return (self.x, self.y)[i]
        def __bool__(self): return bool(self.x or self.y)
        def __abs__(self): return (self.x ** 2 + self.y ** 2) ** .5
        def __neg__(self): return self * -1
        def __lt__(self, other): return abs(self) < (abs(other) if isinstance(other, Vector) else other)
""", """
    v = Vector(3, 4)
    assert v.x == 3 and abs(v) == 5 and v + Vector(1, 1) == Vector(4, 5) and v != Vector(0, 0)
    assert (v * 2).y == 8 and (2 * v).x == 6 and -v == Vector(-3, -4)
    assert repr(v) == "Vector(3, 4)" == str(v) and f"{v}" == "Vector(3, 4)"
    assert len(v) == 2 and list(v) == [3, 4] and v[1] == 4 and v and not Vector(0, 0)
    x, y = v
    assert (x, y) == (3, 4) and 4 in v and 5 not in v
    assert isinstance(v, Vector) and type(v) is Vector and type(v).__name__ == "Vector" == v.__class__.__name__
    assert len({Vector(1, 2), Vector(1, 2)}) == 1 and {v: 1}[Vector(3, 4)] == 1 and v in [Vector(3, 4)]
    assert sorted([v, Vector(1, 1)])[0] == Vector(1, 1) and v < 6 and not v < 5
    v.x = 9
    assert v.x == 9 and hasattr(v, "y") and not hasattr(v, "z") and vars(v) == {"x": 9, "y": 4}
    assert callable(Vector) and not callable(v)
    assert v.z is None
    assert v[2] == 0
""")
task("a stack", """
    class Stack:
        made = 0
        def __init__(self):
            self.items = []
            Stack.made += 1
        def push(self, x):
            self.items.append(x)
            return self
        def pop(self):
            if not self.items: raise IndexError("pop from empty stack")
            return self.items.pop()
        @property
        def size(self): return len(self.items)
        @classmethod
        def of(cls, *items):
            found = cls()
            for x in items: found.push(x)
            return found
        @staticmethod
        def name(): return "stack"
        def __enter__(self): return self
        def __exit__(self, kind, *_):
            self.items.clear()
            return kind is ValueError
        def __contains__(self, x): return x in self.items
    class Peek(Stack):
        def top(self): return self.items[-1]
""", """
    s = Stack()
    assert s.push(1).push(2) is s and s.pop() == 2 and s.size == 1 and Stack.made == 1
    assert Stack.of(1, 2).items == [1, 2] and Stack.name() == "stack" and Peek.of(4).top() == 4
    assert isinstance(Peek(), Stack) and issubclass(Peek, Stack) and not isinstance(s, Peek)
    with Stack.of(1) as t: raise ValueError
    assert t.items == []
    try:
        t.pop()
        assert False
    except IndexError as error: assert str(error) == "pop from empty stack"
    t.extra = {"a": 1}
    assert t.extra == {"a": 1}
    u = Stack()
    u.items = [4]
    assert 4 in u and 5 not in u
    assert s.size == 2
    s.size = 3
""")
task("threads", """
    import threading
    class Counter:
        def __init__(self): self.n, self.lock = 0, threading.Lock()
        def add(self):
            with self.lock: self.n += 1
    def squares(f, n):
        out = [None] * n
        def work(i): out[i] = f(i)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
        for t in threads: t.start()
        for t in threads: t.join()
        return out
""", """
    import threading
    c = Counter()
    threads = [threading.Thread(target=c.add) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert c.n == 8
    assert squares(lambda x: x * x, 6) == [0, 1, 4, 9, 16, 25]
""")
task("abstract classes and data classes", """
    from abc import ABC, abstractmethod
    from dataclasses import asdict, dataclass, field
    from enum import Enum, IntEnum
    from typing import NamedTuple
    class Shape(ABC):
        @abstractmethod
        def area(self): ...
    class Square(Shape):
        def __init__(self, a): self.a = a
        def area(self): return self.a ** 2
    @dataclass(order=True, frozen=True)
    class Version:
        major: int
        minor: int = 0
        tags: tuple = field(default=(), compare=False)
    class Point(NamedTuple):
        x: int
        y: int = 0
    class Color(Enum):
        RED = 1
        BLUE = 2
    class Level(IntEnum):
        LOW = 1
        HIGH = 5
    def plain(v): return asdict(v)
""", """
    assert Square(3).area() == 9 and isinstance(Square(1), Shape)
    try:
        Shape()
        assert False
    except TypeError: pass
    assert Version(1) < Version(1, 2) and Version(1) == Version(1, 0, ("x",)) and hash(Version(1)) == hash(Version(1))
    assert repr(Version(1)) == "Version(major=1, minor=0, tags=())"
    assert plain(Version(2)) == {"major": 2, "minor": 0, "tags": ()}
    try:
        Version(1).major = 2
        assert False
    except AttributeError: pass
    assert Point(1) == (1, 0) and Point(1).y == 0 and isinstance(Point(1), tuple)
    assert Point(1, 2)._replace(x=5) == (5, 2)
    x, y = Point(3, 4)
    assert y == 4 and Point(3)[0] == 3 and {Point(1): 2}[(1, 0)] == 2
    assert Color.RED.value == 1 and Color["BLUE"] is Color.BLUE and Color(1) is Color.RED and Color.RED != Color.BLUE
    assert [c.name for c in Color] == ["RED", "BLUE"] and len(Color) == 2 and isinstance(Color.RED, Color)
    assert Level.HIGH == 5 and Level.LOW + 1 == 2 and Level.LOW < Level.HIGH and Level(5) is Level.HIGH
    assert Color.RED == 1
    assert Version("a") < Version(1)
""")
task("made from plain types", """
    class Bag(list):
        def total(self): return sum(self)
    class Loose(dict):
        def __missing__(self, key): return key * 2
    class Meter(float):
        def feet(self): return self * 3.28084
    class Name(str):
        @property
        def initial(self): return self[0]
""", """
    b = Bag([1, 2])
    b.append(3)
    assert b == [1, 2, 3] and b.total() == 6 and len(b) == 3 and b[-1] == 3 and list(reversed(b)) == [3, 2, 1]
    assert Loose(a=1)["q"] == "qq" and Loose(a=1) == {"a": 1} and "a" in Loose(a=1) and list(Loose(b=1)) == ["b"]
    assert Meter(2) == 2.0 and abs(Meter(2).feet() - 6.56168) < 1e-9 and Meter(1) + 1 == 2
    assert Name("Ada") == "Ada" and Name("Ada").initial == "A" and Name("Ada").lower() == "ada"
    assert isinstance(Name("x"), str)
    assert Bag([1]) == [2]
    assert Bag([1]) != [1]
""")
task("iterators of one's own", """
    class Countdown:
        def __init__(self, n): self.n = n
        def __iter__(self): return self
        def __next__(self):
            if self.n == 0: raise StopIteration
            self.n -= 1
            return self.n + 1
    class Tree:
        def __init__(self): self.value, self.left, self.right = None, None, None
        def insert(self, v):
            if self.value is None: self.value, self.left, self.right = v, Tree(), Tree()
            else: (self.left if v < self.value else self.right).insert(v)
        def __iter__(self):
            if self.value is None: return
            yield from self.left
            yield self.value
            yield from self.right
""", """
    assert list(Countdown(3)) == [3, 2, 1] and sum(Countdown(4)) == 10
    t = Tree()
    for v in (5, 2, 8, 1): t.insert(v)
    assert list(t) == [1, 2, 5, 8] and t.left.value == 2 and t.right.left.value is None and 8 in t
    assert sorted(t, reverse=True) == [8, 5, 2, 1]
    assert list(Countdown(1)) == [2]
""")
task("async", """
    import asyncio
    async def later(x):
        await asyncio.sleep(.001)
        return x + 1
    async def fails(): raise KeyError(3)
    async def ticks(n):
        for i in range(n):
            await asyncio.sleep(0)
            yield i
    class Session:
        async def __aenter__(self): return 5
        async def __aexit__(self, *_): return False
""", """
    import asyncio, inspect
    assert asyncio.run(later(1)) == 2
    async def main(): return await later(5), await asyncio.gather(later(1), later(2)), [x async for x in ticks(3)]
    assert asyncio.run(main()) == (6, [2, 3], [0, 1, 2])
    async def entered():
        async with Session() as s: return s
    assert asyncio.run(entered()) == 5
    try:
        asyncio.run(fails())
        assert False
    except KeyError as error: assert error.args == (3,)
    assert asyncio.run(later(1)) == 3
""")
task("input and output", """
    import sys
    def greet(name): print("hello", name, sep=", ", end="!\\n")
    def ask(): return input("? ") + "."
    def read(): return [line.strip() for line in sys.stdin]
    def loud():
        sys.stdout.write("x" * 10)
        return "done"
""", """
    import contextlib, io, sys
    from unittest.mock import patch
    out = io.StringIO()
    with contextlib.redirect_stdout(out): greet("you")
    assert out.getvalue() == "hello, you!\\n"
    with patch("builtins.input", return_value="bob"): assert ask() == "bob."
    with patch("sys.stdin", io.StringIO("a\\nb\\n")): assert read() == ["a", "b"]
    with patch("sys.stdin", io.StringIO("zed\\n")), contextlib.redirect_stdout(out): assert ask() == "zed."
    with contextlib.redirect_stdout(io.StringIO()) as other: assert loud() == "done"
    assert other.getvalue() == "x" * 10
    assert out.getvalue() == ""
""")
task("names of the module", """
    counter = 0
    CONFIG = {"a": [1]}
    def step():
        global counter
        counter += 1
        return counter
    def options(a, *rest, c=3, **more):
        "Shows its arguments."
        return a, rest, c, more
""", """
    step()
    assert step() == 2 and counter == 2 and CONFIG["a"][0] == 1
    from solution import step as again
    assert again() == 3
    import solution
    assert solution.counter == 3
    assert options(1, 2, 3, c=4, e=5) == (1, (2, 3), 4, {"e": 5}) and options(*[1], **{"z": 2}) == (1, (), 3, {"z": 2})
    assert options.__name__ == "options"
    assert missing == 1
    assert counter == 4
""")
task("functions that make functions", """
    def adder(n): return lambda x: x + n
    def account(balance):
        def deposit(x):
            nonlocal balance
            balance += x
            return balance
        return deposit
    def curry(f): return lambda a: lambda b: f(a, b)
    table = {"double": lambda x: 2 * x}
""", """
    assert adder(2)(3) == 5 and list(map(adder(1), [1, 2])) == [2, 3]
    d = account(10)
    assert d(5) == 15 and d(5) == 20
    assert curry(lambda a, b: a * b)(3)(4) == 12
    assert table["double"](4) == 8 and callable(adder(1))
    assert adder(1) == 1
""")
task("looking at a program", """
    def f(a, b=2, *c, d: int = 3, **e) -> str:
        "Says a."
        return a
    def g(): yield 1
    async def h(): return 1
    class K:
        "A class."
        def __init__(self): self.x = [1]
        def m(self): return 1
""", """
    import asyncio, copy, inspect, types
    assert isinstance(g(), types.GeneratorType) and inspect.isgenerator(g()) and inspect.isgeneratorfunction(g)
    assert inspect.iscoroutinefunction(h) and asyncio.iscoroutinefunction(h) and not inspect.isgeneratorfunction(f)
    assert str(inspect.signature(f)) == "(a, b=2, *c, d: int = 3, **e) -> str" and f.__defaults__ == (2,)
    assert f.__doc__ == "Says a." == inspect.getdoc(f) and f.__code__.co_varnames[0] == "a"
    assert inspect.isfunction(f) and isinstance(f, types.FunctionType) and callable(f) and not isinstance(f, type)
    k = K()
    other = copy.deepcopy(k)
    assert other is not k and other.x == [1] and isinstance(other, K) and copy.copy(k).x == [1]
    assert inspect.isclass(K) and inspect.ismethod(k.m) and K.__doc__ == "A class." and K.__qualname__ == "K"
    assert "m" in dir(k) and hasattr(K, "m") and [n for n in dir(k) if n[0] != "_"] == ["m", "x"]
    assert inspect.isgenerator(f)
""")
task("text work", r"""
    import json, re, string
    def words(text): return re.findall(r"\w+", text.lower())
    def match(text): return re.fullmatch(r"(\d+)-(\d+)", text)
    def dump(x): return json.dumps(x, sort_keys=True)
    def roman(n):
        out = ""
        for value, letter in ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
            while n >= value: out, n = out + letter, n - value
        return out
""", """
    assert words("Ab, ab!") == ["ab", "ab"]
    assert match("1-22").group(2) == "22" and match("x") is None and match("1-2").groups() == ("1", "2")
    assert dump({"b": [1, None], "a": True}) == '{"a": true, "b": [1, null]}'
    assert roman(14) == "XIV" and roman(9) == "IX"
    assert roman(4) == "IIII"
""")
task("graphs", """
    from collections import deque
    import heapq
    def path(graph, a, b):
        seen, queue = {a}, deque([[a]])
        while queue:
            way = queue.popleft()
            if way[-1] == b: return way
            for n in graph.get(way[-1], ()):
                if n not in seen:
                    seen.add(n)
                    queue.append([*way, n])
    def smallest(items, k): return heapq.nsmallest(k, items)
    def transpose(rows): return [list(column) for column in zip(*rows)]
""", """
    graph = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}
    assert path(graph, "a", "d") == ["a", "b", "d"] and path(graph, "d", "a") is None
    assert graph == {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}
    assert smallest({5, 1, 3}, 2) == [1, 3]
    assert transpose([[1, 2], [3, 4]]) == [[1, 3], [2, 4]] and transpose([]) == []
    assert transpose([(1,)]) == [(1,)]
""")
task("a cache", """
    from collections import OrderedDict
    class LRU:
        def __init__(self, size): self.size, self.data = size, OrderedDict()
        def get(self, key):
            if key not in self.data: return -1
            self.data.move_to_end(key)
            return self.data[key]
        def put(self, key, value):
            self.data[key] = value
            self.data.move_to_end(key)
            if len(self.data) > self.size: self.data.popitem(last=False)
        def keys(self): return self.data.keys()
""", """
    c = LRU(2)
    c.put(1, 1)
    c.put(2, 2)
    assert c.get(1) == 1
    c.put(3, 3)
    assert c.get(2) == -1 and c.get(3) == 3 and list(c.keys()) == [1, 3]
    assert c.get(1) == -1
    assert c.keys() == {1, 3}
""")
task("wrong programs", """
    def f(x): return x
    def g(x): return str(x)
    def h(x): raise ValueError(x)
    def k(x): pass
""", """
    assert f(2) == 4
    assert g(2) == 2
    assert h(2) == 2
    assert k(2) == 2
    assert k(2) is None
    assert f(2) == 2
    assert f() == 2
    assert nothing(2) == 2
""")
task("a module that ends badly", """
    def f(x): return x
    raise RuntimeError("at the end")
""", "assert f(1) == 1")
task("a module that does not parse", "def f(x) return x", "assert f(1) == 1")
task("a module that leaves", """
    import sys
    def f(x): return x
    sys.exit(0)
""", "assert f(1) == 1")
task("definitions of tests that fail", "def f(x): return x", """
    assert f(1) == 1
    wrong = f(2) / 0
    assert f(3) == 3
""")
