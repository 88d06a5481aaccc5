"""Parts of the site that smalldocs doesn't make: the gallery, search without a server, our style."""
import base64
import io
import json
from pathlib import Path

from PIL import Image

STYLE = """
/* copd_nb: drawings fit the column and scroll where it is too narrow to read them; tables and code have room */
:root{--sd-body-width:860px;--sd-sidebar-width:230px;--sd-margin-width:190px}
main pre{font-size:.8rem}
main svg[role="img"]{max-width:100%;height:auto;min-width:34rem}
main svg[role="img"][width]{width:auto}
main div[style*="overflow-x"]{margin:.8rem 0}
main table{display:block;max-width:100%;width:max-content;overflow-x:auto;font-size:.92em;
  font-variant-numeric:tabular-nums}
main table :is(th,td){padding:.38rem .8rem!important;vertical-align:top;min-width:3rem}
main table :is(th,td):first-child{min-width:6.5rem}
main table:has(th:nth-child(8)) :is(th,td):first-child{min-width:13rem}
main .gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:1rem;padding:0;
  list-style:none}
main .gallery a{display:block;height:100%;border:1px solid #8884;border-radius:8px;padding:.5rem;
  text-decoration:none}
main .gallery img{width:100%;height:9.5rem;object-fit:contain;background:#fff;border-radius:5px;padding:4px}
main .gallery span{display:block;font-size:.9em;margin-top:.4rem}
"""
FETCH = 'const r = await fetch(offset + "search.json");\n      index = await r.json();'
SCRIPT = """await new Promise((done, failed) => {
        const s = document.createElement("script");
        s.src = offset + "search.js";
        s.onload = done;
        s.onerror = failed;
        document.head.append(s);
      });
      index = window.smalldocsIndex;"""
LONGEST = 600  # characters of a section that can be found


def search_from_files(site: Path):
    "Let the search load its index as a script: a browser fetches nothing from file://. ValueError if it can't be set."
    program = site / "site_libs" / "smalldocs.js"
    text = program.read_text(encoding="utf-8")
    if text.count(FETCH) != 1: raise ValueError("smalldocs.js loads its index in another way than it did in 0.5.4")
    program.write_text(text.replace(FETCH, SCRIPT), encoding="utf-8")
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    short = [{**e, "text": e["text"][:LONGEST]} for e in index]
    packed = json.dumps(short, ensure_ascii=False).replace("</", "<\\/")
    (site / "search.js").write_text(f"window.smalldocsIndex = {packed};\n", encoding="utf-8")


def add_style(site: Path):
    "Append our style to that of the site."
    with (site / "site_libs" / "smalldocs.css").open("a", encoding="utf-8") as file: file.write(STYLE)


def pictures(notebook: Path) -> list[bytes]:
    "The PNG figures of a notebook as it is committed."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    data = [o.get("data", {}).get("image/png") for c in cells for o in c.get("outputs", [])]
    return [base64.b64decode("".join(d)) for d in data if d]


def title(notebook: Path) -> str:
    "The heading of a notebook."
    lines = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()
    return next(line.lstrip("# ") for line in lines if line.startswith("# "))


def gallery(groups: dict[str, list[tuple[Path, str]]], source: Path) -> str:
    "A page of small figures: heading → notebooks with their addresses. Each links to the page that makes it."
    (source / "img" / "gallery").mkdir(parents=True, exist_ok=True)
    lines = ["# Gallery", "", "Every figure is an output of a notebook as it is committed, and leads to its code."]
    for heading, notebooks in groups.items():
        found = [(notebook, address, shown[0]) for notebook, address in notebooks if (shown := pictures(notebook))]
        if not found: continue
        items = []
        for notebook, address, data in found:
            file = f"img/gallery/{notebook.parent.name}-{notebook.stem}.png"
            small = Image.open(io.BytesIO(data)).convert("RGB")
            small.thumbnail((520, 520), Image.Resampling.LANCZOS)
            small.quantize(128).save(source / file, optimize=True)
            items.append(f'<li><a href="{address}"><img src="{file}" alt="{title(notebook)}" loading="lazy">'
                         f"<span>{title(notebook)}</span></a></li>")
        lines += ["", f"## {heading}", "", f'<ul class="gallery">{"".join(items)}</ul>']
    return "\n".join(lines) + "\n"
