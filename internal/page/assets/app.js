// The browser's part of the page: it enters, fetches what the issuer has
// rendered, keeps the address, and stays live. It lays nothing out.
"use strict";
(() => {
  const KEY = "sallyport-session";
  const $ = (q, at = document) => at.querySelector(q);
  const themes = ["auto", "light", "dark"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let session = null, csrf = "", flow = null, held = null;

  function paint() {
    const t = localStorage.getItem("sallyport-theme") || "auto";
    document.documentElement.dataset.theme = t === "auto" ? (dark.matches ? "dark" : "light") : t;
    const b = $("#theme");
    if (b) { b.textContent = t; b.setAttribute("aria-label", "Colours: " + t); }
  }
  paint();
  dark.addEventListener("change", paint);

  const headers = (more) => Object.assign(session ? { Authorization: "Bearer " + session } : {}, more);

  async function enter() {
    const token = location.hash.slice(1);
    session = sessionStorage.getItem(KEY);
    let r;
    if (token) {
      history.replaceState(null, "", location.pathname + location.search);
      r = await fetch("/session", { method: "POST", body: JSON.stringify({ token }) });
    }
    if (!r || !r.ok && session) r = await fetch("/session", { headers: headers() });
    if (!r.ok) { say("Not entered", (await r.text()).trim(), r.headers.get("Sallyport-Signin")); pulse("lost", "out"); return false; }
    const s = await r.json();
    session = s.session; csrf = s.csrf;
    if (session) sessionStorage.setItem(KEY, session);
    $("#domain").textContent = s.trust_domain + " · " + s.who;
    return true;
  }

  function say(title, text, signin) {
    const m = $("#main");
    m.replaceChildren();
    const h = document.createElement("h1"), p = document.createElement("p");
    h.textContent = title; p.textContent = text; p.className = "lede";
    m.append(h, p);
    if (signin) {
      const a = document.createElement("a");
      a.href = signin; a.id = "signin"; a.className = "button"; a.textContent = "Sign in";
      m.append(a);
    }
    document.title = title + " · Sallyport";
  }

  function pulse(is, text) {
    const p = $("#pulse");
    if (p.dataset.is !== is) { p.dataset.is = is; p.textContent = text; }
  }

  // swap shows what came, and leaves focus, selection and scrolling where they
  // were. While somebody writes or selects, it waits.
  function swap(html, moved) {
    const m = $("#main"), at = document.activeElement, inside = m.contains(at) && at !== m;
    const writes = inside && /^(INPUT|SELECT|TEXTAREA)$/.test(at.tagName);
    const selects = !getSelection().isCollapsed && m.contains(getSelection().anchorNode);
    if (!moved && (writes || selects || $("dialog[open]"))) { held = html; return; }
    held = null;
    const keep = [...m.querySelectorAll("[data-keep]")].map((e) => [e.id, e.scrollLeft, e.scrollTop]);
    const rows = [...m.querySelectorAll("tbody a, .card a")], row = rows.indexOf(at), id = inside ? at.id : "";
    const start = writes ? at.selectionStart : null;
    m.innerHTML = html;
    if (!moved || id) keep.forEach(([i, x, y]) => { const e = document.getElementById(i); if (e) e.scrollTo(x, y); });
    let to = id && document.getElementById(id);
    if (!to && row >= 0 && !moved) to = m.querySelectorAll("tbody a, .card a")[row];
    if (to) { to.focus({ preventScroll: true }); if (start !== null && to.setSelectionRange) to.setSelectionRange(start, start); }
    document.title = $("h1", m).textContent + " · Sallyport";
    tick();
  }

  function short(s) {
    s = Math.abs(s);
    if (s < 60) return Math.floor(s) + " s";
    if (s < 3600) return Math.floor(s / 60) + " min";
    if (s < 172800) return Math.floor(s / 3600) + " h";
    return Math.floor(s / 86400) + " d";
  }
  function tick() {
    for (const t of document.querySelectorAll("time[data-ago]")) {
      t.title = t.dateTime; t.textContent = short((Date.now() - new Date(t.dateTime)) / 1000) + " ago";
    }
    for (const t of document.querySelectorAll("time[data-left]")) {
      const s = (new Date(t.dateTime) - Date.now()) / 1000;
      t.title = t.dateTime; t.textContent = s > 0 ? short(s) : "expired"; t.classList.toggle("bad", s <= 0);
    }
  }
  setInterval(tick, 1000);

  const here = () => location.pathname + location.search;

  function mark() {
    const v = location.pathname === "/service" ? "/services" : location.pathname;
    for (const a of document.querySelectorAll(".top nav a")) {
      if (a.getAttribute("href") === v) a.setAttribute("aria-current", "page"); else a.removeAttribute("aria-current");
    }
  }

  async function show(focus) {
    mark();
    const url = here();
    if (flow) flow.abort();
    flow = new AbortController();
    const mine = flow;
    try {
      const r = await fetch("/view" + url, { headers: headers(), signal: mine.signal });
      const text = await r.text();
      if (mine !== flow) return;
      if (!r.ok) { say(r.status === 401 ? "Not entered" : "This cannot be shown", text.trim(), r.headers.get("Sallyport-Signin")); pulse("lost", "out"); return; }
      swap(text, true);
      performance.mark("shown");
      document.documentElement.dataset.shown = url;
      if (focus) $("#main").focus({ preventScroll: true });
    } catch (e) {
      if (mine !== flow) return;
      pulse("lost", "lost");
    }
    if (location.pathname === "/audit") { pulse("still", "still"); return; }
    live(url, mine, 500);
  }

  // live reads server-sent events by fetch: EventSource shows no session.
  async function live(url, mine, wait) {
    try {
      const r = await fetch("/live" + url, { headers: headers(), signal: mine.signal });
      if (r.status === 401 || r.status === 403) { say("Not entered", (await r.text()).trim(), r.headers.get("Sallyport-Signin")); pulse("lost", "out"); return; }
      if (!r.ok) throw new Error(r.status);
      pulse("live", "live");
      wait = 500;
      const reader = r.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        text += value;
        for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
          const data = /^data: (.*)$/m.exec(text.slice(0, end));
          if (/^event: view$/m.test(text.slice(0, end)) && data && mine === flow) swap(JSON.parse(data[1]), false);
        }
      }
    } catch (e) {
      if (mine.signal.aborted) return;
    }
    if (mine !== flow) return;
    pulse("lost", "lost");
    setTimeout(() => mine === flow && live(url, mine, Math.min(2 * wait, 8000)), wait);
  }

  function go(url, focus) {
    if (url !== here()) history.pushState(null, "", url);
    scrollTo(0, 0);
    return show(focus);
  }

  function ask(text, yes) {
    const d = $("#ask");
    $("#ask-text").textContent = text; $("#ask-yes").textContent = yes;
    d.returnValue = "no";
    d.showModal();
    return new Promise((done) => d.addEventListener("close", () => done(d.returnValue === "yes"), { once: true }));
  }

  async function move(b) {
    if (!await ask(b.dataset.ask, b.textContent)) return;
    const { service, route, move } = b.dataset;
    const r = await fetch("/rollout", { method: "POST", headers: headers({ "Sallyport-Csrf": csrf }), body: JSON.stringify({ service, route, move }) });
    if (!r.ok) await ask((await r.text()).trim(), "I see");
    show(false);
  }

  function typed(e) {
    const at = document.activeElement;
    if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(at.tagName) && at.type !== "checkbox" || $("dialog[open]")) {
      if (e.key === "Escape" && at.tagName === "INPUT") at.blur();
      return;
    }
    const views = [...document.querySelectorAll(".top nav a")];
    if (views[e.key - 1]) go(views[e.key - 1].getAttribute("href"), true);
    else if (e.key === "/") { const f = $("main input:not([type=hidden]), main select"); if (!f) return; f.focus(); }
    else if (e.key === "j" || e.key === "k") {
      const rows = [...document.querySelectorAll("main tbody tr, main .card")].map((r) => $("a", r)).filter(Boolean);
      const row = rows.findIndex((a) => a.closest("tr, .card").contains(at));
      const next = rows[row < 0 ? 0 : Math.max(0, Math.min(rows.length - 1, row + (e.key === "j" ? 1 : -1)))];
      if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
    } else if (e.key === "?") $("#help").showModal();
    else return;
    e.preventDefault();
  }

  addEventListener("DOMContentLoaded", async () => {
    paint();
    $("#theme").addEventListener("click", () => {
      const t = localStorage.getItem("sallyport-theme") || "auto";
      localStorage.setItem("sallyport-theme", themes[(themes.indexOf(t) + 1) % 3]);
      paint();
    });
    $("#keys").addEventListener("click", () => $("#help").showModal());
    document.addEventListener("click", (e) => {
      if (e.defaultPrevented || e.button || e.ctrlKey || e.metaKey || e.shiftKey || !(e.target instanceof Element)) return;
      const copy = e.target.closest("[data-copy]"), mv = e.target.closest("[data-move]"), a = e.target.closest("a[href]");
      if (copy) {
        navigator.clipboard.writeText(copy.dataset.copy).then(() => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy"; }, 1500); });
      } else if (mv) move(mv);
      else if (a) {
        const to = a.getAttribute("href");
        if (!to.startsWith("/") || to.startsWith("/assets") || to.startsWith("/oidc/")) return;
        e.preventDefault();
        go(to, !a.closest("main"));
      }
    });
    const send = (f) => {
      const q = new URLSearchParams([...new FormData(f)].filter(([, v]) => v !== ""));
      go(location.pathname + (q.size ? "?" + q : ""), false);
    };
    document.addEventListener("submit", (e) => { if (e.target.matches("[data-nav]")) { e.preventDefault(); send(e.target); } });
    document.addEventListener("change", (e) => { if (e.target.matches("[data-nav] input[type=checkbox], [data-nav] select")) send(e.target.form); });
    document.addEventListener("focusout", () => { if (held !== null) setTimeout(() => held !== null && swap(held, false)); });
    document.addEventListener("keydown", typed);
    addEventListener("popstate", () => show(false));
    if (await enter()) show(false);
  });
})();
