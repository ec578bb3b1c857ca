"""The style of the API's page: light and dark, narrow and wide, nothing from elsewhere."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--line:#d8dee4;--box:#f5f7f9;
--link:#0b57d0;--get:#0a6b3d;--post:#0b57d0;--delete:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e4e7ea;--soft:#9aa4af;--line:#333a42;
--box:#1e2328;--link:#8ab4f8;--get:#7bd3a3;--post:#8ab4f8;--delete:#f2a29b}}
*{box-sizing:border-box}
html{scroll-padding-top:1rem}
body{margin:0;font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
color:var(--fg);background:var(--bg)}
a{color:var(--link);text-decoration-thickness:1px;text-underline-offset:2px}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--bg);
padding:.3rem .6rem;z-index:1}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
code{overflow-wrap:anywhere}
pre{background:var(--box);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;margin:.4rem 0;
overflow-x:auto;max-height:24rem;white-space:pre-wrap;overflow-wrap:anywhere}
main{max-width:52rem;padding:1.5rem 1rem 4rem;margin:0 auto}
h1{font-size:1.8rem;margin:0}h2{font-size:1.35rem;margin:3rem 0 .3rem}h4{font-size:1rem;margin:1.2rem 0 .2rem}
h3{font-size:1.05rem;margin:0;display:flex;flex-wrap:wrap;gap:.2rem .7rem;align-items:baseline}
h3 a{color:inherit;text-decoration:none}h3 a:hover{text-decoration:underline}
p{margin:.4rem 0}.soft{color:var(--soft)}
.op,.schema{border-top:1px solid var(--line);padding:1.2rem 0;margin-top:1.2rem}
.m{font:600 .8rem/1.6 ui-monospace,monospace}
.get{color:var(--get)}.post{color:var(--post)}.delete{color:var(--delete)}
dl{margin:.3rem 0}dt{margin-top:.6rem}dd{margin:0 0 0 1.2rem;overflow-wrap:anywhere}
.pairs{display:grid;grid-template-columns:3rem minmax(0,1fr);gap:.2rem .5rem}.pairs dt,.pairs dd{margin:0}
details{margin:.3rem 0}summary{cursor:pointer;padding:.15rem 0}
nav ul{list-style:none;margin:.2rem 0 1rem;padding:0}nav li{margin:.15rem 0}
nav a{display:flex;gap:.5rem;text-decoration:none;color:var(--fg);font-size:.86rem;padding:.1rem 0}
nav a:hover{text-decoration:underline}nav .m{font-size:.68rem;min-width:3.2rem;line-height:1.9}
nav ul{columns:10.5rem}nav li{break-inside:avoid}nav strong{font-size:.86rem}
nav{border-bottom:1px solid var(--line);padding:1rem;background:var(--box)}
@media(min-width:64rem){
body{display:grid;grid-template-columns:19rem minmax(0,1fr)}
nav ul{columns:auto}
nav{border:0;border-right:1px solid var(--line);position:sticky;top:0;height:100vh;overflow-y:auto}
main{margin:0;padding:2rem 3rem 5rem}}
"""
