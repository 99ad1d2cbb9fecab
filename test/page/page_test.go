// Package page tests the operator's page in a browser: a tour, by keyboard alone,
// by axe-core in light and dark, and with a mesh of 1,000 services.
package page

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"sallyport/internal/page"
	"sallyport/internal/page/pagetest"
)

//go:embed testdata/axe.min.js
var axe string

// views are all there are, with a word that is on each.
var views = []struct{ path, word string }{
	{"/denied", "Denied now"}, {"/map", "Map"}, {"/map?show=unused", "Map"}, {"/map?than=24h", "Since 24h"}, {"/services", "Services"},
	{"/service?end=spiffe%3A%2F%2Fcorp.example%2Fns%2Fshop%2Fsa%2Fcart", "Callers"}, {"/rollouts", "Rollouts"}, {"/egress", "Egress ledger"}, {"/audit", "Chains"}, {"/ca", "CA and rotation"}, {"/doctor", "Versions"},
}

// figures are what the run says at its end.
var figures = struct {
	tried, failed, violations int
	map1000                   time.Duration
}{}

func TestMain(m *testing.M) {
	code := m.Run()
	if figures.tried > 0 {
		out := map[string]any{
			"name": "page-test", "ok": code == 0,
			"cases":   map[string]int{"tried": figures.tried, "passed": figures.tried - figures.failed, "failed": figures.failed, "skipped": 0},
			"figures": map[string]any{"axe_violations": figures.violations, "map_1000_ms": figures.map1000.Milliseconds()},
		}
		b, _ := json.Marshal(out)
		fmt.Println(string(b))
	}
	os.Exit(code)
}

// tell counts a test.
func tell(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		if t.Skipped() {
			return
		}
		if figures.tried++; t.Failed() {
			figures.failed++
		}
	})
}

// A tab is a browser at a page.
type tab struct {
	t    *testing.T
	ctx  context.Context
	page *page.Page
	mesh *pagetest.Mesh
	url  string
	// bad are the errors of the console; mu guards it.
	mu  sync.Mutex
	bad []string
}

// openTab starts a browser at a page of a mesh of n services.
func openTab(t *testing.T, n int) *tab {
	t.Helper()
	b := &tab{t: t, mesh: pagetest.New(n, time.Now())}
	var err error
	srv := httptest.NewUnstartedServer(nil)
	conf := b.mesh.Config()
	conf.Loopback, conf.Now = srv.Listener.Addr().String(), time.Now
	if b.page, err = page.New(conf); err != nil {
		t.Fatal(err)
	}
	srv.Config.Handler = b.page.Handler()
	srv.Start()
	b.url = srv.URL
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	b.start()
	link, _, err := b.page.NewLink(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.do(chromedp.Navigate(link))
	b.shown("/denied")
	return b
}

// start starts the browser.
func (b *tab) start() {
	t := b.t
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("chromium is missing: %v", err)
		}
		t.Skip("chromium is not installed")
	}
	ctx, stop := chromedp.NewExecAllocator(t.Context(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(chromium), chromedp.NoSandbox, chromedp.WindowSize(1360, 900), chromedp.Flag("disable-dev-shm-usage", true),
		chromedp.Flag("ignore-certificate-errors", true))...) // those of httptest
	t.Cleanup(stop)
	ctx, cancel := chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	b.ctx, cancel = context.WithTimeout(ctx, 3*time.Minute)
	t.Cleanup(cancel)
	b.do(chromedp.Navigate("about:blank"))
	console := chromedp.Console(b.ctx)
	go func() {
		for m, err := range console {
			if err != nil {
				return
			}
			if m.IsException() || m.Type == chromedp.ConsoleError {
				b.mu.Lock()
				b.bad = append(b.bad, m.String())
				b.mu.Unlock()
			}
		}
	}()
}

func (b *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		b.t.Fatal(err)
	}
}

// keys types keys one after another.
func (b *tab) keys(keys ...string) {
	b.t.Helper()
	for _, k := range keys {
		b.do(chromedp.KeyEvent(k))
	}
}

// evaluate returns the value of an expression, or that of its promise.
func evaluate[T any](b *tab, expression string) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.t.Fatalf("%v, of %.200s", err, expression)
	}
	return v
}

// is waits until an expression of the page is true. A page that is being loaded
// has no answer yet.
func (b *tab) is(expression string) {
	b.t.Helper()
	late := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		so, err := chromedp.Run(b.ctx, chromedp.Evaluate[bool](expression))
		if so && err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			b.t.Fatalf("it does not come to be that %s: %v; the page is at %s and says:\n%.600s", expression, err,
				b.text("location.pathname + location.search"), b.text(`document.querySelector("main").innerText`))
		case <-b.ctx.Done():
			b.t.Fatal(b.ctx.Err())
		}
	}
}

// shown waits until the page shows an address.
func (b *tab) shown(path string) {
	b.t.Helper()
	b.is(fmt.Sprintf("document.documentElement.dataset.shown === %q", path))
}

func (b *tab) text(expression string) string {
	b.t.Helper()
	return evaluate[string](b, expression)
}

// visit goes to an address by the page's own hand, without loading anew.
func (b *tab) visit(path string) {
	b.t.Helper()
	b.text(fmt.Sprintf(`{const a = document.createElement("a"); a.href = %q; document.body.append(a); a.click(); a.remove(); "";}`, path))
	b.shown(path)
}

func (b *tab) theme(name string) {
	b.t.Helper()
	_, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: name}}})
	if err != nil {
		b.t.Fatal(err)
	}
	b.is(fmt.Sprintf("document.documentElement.dataset.theme === %q", name))
}

func (b *tab) shoot(name string) {
	b.t.Helper()
	dir := filepath.Join("..", "..", "bin", "page")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	png, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// calm says that the console has no errors.
func (b *tab) calm() {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, text := range b.bad {
		b.t.Errorf("console: %s", text)
	}
}

func name(path string) string {
	path, query, _ := strings.Cut(strings.TrimPrefix(path, "/"), "?")
	if key, _, ok := strings.Cut(query, "="); ok && path != "service" {
		return path + "-" + key
	}
	return path
}

// TestTour clicks through every view, and looks at what is live.
func TestTour(t *testing.T) {
	tell(t)
	b := openTab(t, 40)
	b.theme("light")
	if at := b.text("location.href"); at != b.url+"/denied" {
		t.Errorf("the link leaves %q in the address", at)
	}
	for _, v := range views {
		b.visit(v.path)
		if text := b.text(`document.querySelector("main").innerText`); !strings.Contains(text, v.word) {
			t.Errorf("%s does not say %q", v.path, v.word)
		}
		if title := b.text("document.title"); !strings.HasSuffix(title, " · Sallyport") {
			t.Errorf("%s has the title %q", v.path, title)
		}
		b.shoot(name(v.path) + "-light")
	}
	b.theme("dark")
	for _, v := range views {
		b.visit(v.path)
		b.shoot(name(v.path) + "-dark")
	}
	b.do(chromedp.Click(chromedp.CSS(`nav a[href="/denied"]`)))
	b.shown("/denied")
	b.is(`document.querySelector("#pulse").dataset.is === "live"`)
	b.mesh.Deny("/v9/news")
	b.is(`document.querySelector("main").innerText.includes("/v9/news")`)
	b.do(chromedp.Click(chromedp.CSS(`.card a.end`)))
	b.is(`location.pathname === "/service"`)
	b.text(`history.back(); ""`)
	b.shown("/denied")
	b.do(chromedp.Reload())
	b.shown("/denied") // the session outlives it
	b.calm()
}

// TestKeyboard works without a mouse.
func TestKeyboard(t *testing.T) {
	tell(t)
	b := openTab(t, 40)
	for i, path := range []string{"/denied", "/map", "/services", "/rollouts", "/egress", "/audit", "/ca", "/doctor"} {
		b.keys(fmt.Sprint(i + 1))
		b.shown(path)
	}
	b.keys("2")
	b.shown("/map")
	b.keys("/")
	b.is(`document.activeElement.id === "focus"`)
	b.text(`document.activeElement.value = ""`) // the protocol types the key all the same
	b.keys("api.stripe.test", kb.Enter)
	b.shown("/map?span=1h&focus=api.stripe.test&show=all")
	b.is(`document.querySelectorAll("tbody tr").length === 1`)
	b.keys(kb.Escape)
	b.is(`document.activeElement.id !== "focus"`)
	b.keys("3")
	b.shown("/services")
	b.keys("j", "j")
	b.is(`document.activeElement.closest("tr").rowIndex === 2`)
	b.keys(kb.Enter)
	b.is(`location.pathname === "/service"`)
	b.keys("?")
	b.is(`document.querySelector("#help").open`)
	b.keys(kb.Escape)
	b.is(`!document.querySelector("#help").open`)
	b.keys("4")
	b.shown("/rollouts")
	b.tabTo(`#promote-shop-cart-default`)
	b.keys(kb.Enter)
	b.is(`document.querySelector("#ask").open`)
	b.tabTo(`#ask-yes`)
	b.keys(kb.Enter)
	b.is(`document.querySelector("main").innerText.includes("step 3 of 3")`)
	if m := b.mesh.Moves; len(m) != 1 || m[0].Move != "promote" {
		t.Errorf("moved %+v", m)
	}
	b.calm()
}

// tabTo presses Tab until an element has the focus, and sees that each that has
// it shows.
func (b *tab) tabTo(selector string) {
	b.t.Helper()
	for range 60 {
		b.keys(kb.Tab)
		if b.text(fmt.Sprintf(`String(document.activeElement.matches(%q))`, selector)) == "true" {
			if b.text(`getComputedStyle(document.activeElement).outlineStyle`) == "none" {
				b.t.Errorf("%s has the focus and does not show it", selector)
			}
			return
		}
	}
	b.t.Fatalf("the key Tab does not come to %s", selector)
}

// TestAxe has axe-core look at every view in light and dark.
func TestAxe(t *testing.T) {
	tell(t)
	b := openTab(t, 40)
	b.text(axe + `;""`)
	for _, theme := range []string{"light", "dark"} {
		b.theme(theme)
		for _, v := range views {
			b.visit(v.path)
			b.look(v.path + " in " + theme)
		}
		b.keys("?")
		b.is(`document.querySelector("#help").open`)
		b.look("help in " + theme)
		b.keys(kb.Escape)
		b.is(`!document.querySelector("#help").open`)
	}
}

func (b *tab) look(at string) {
	b.t.Helper()
	got := evaluate[struct {
		Violations []struct {
			ID    string `json:"id"`
			Help  string `json:"help"`
			Nodes []struct {
				HTML string `json:"html"`
				Why  string `json:"failureSummary"`
			} `json:"nodes"`
		} `json:"violations"`
		Passes int `json:"passes"`
	}](b, `axe.run(document).then((r) => ({passes: r.passes.length, violations: r.violations.map((v) => ({id: v.id, help: v.help, nodes: v.nodes.map((n) => ({html: n.html, failureSummary: n.failureSummary}))}))}))`)
	if got.Passes == 0 {
		b.t.Errorf("%s: axe has looked at nothing", at)
	}
	for _, v := range got.Violations {
		figures.violations += len(v.Nodes)
		for _, n := range v.Nodes[:min(len(v.Nodes), 3)] {
			b.t.Errorf("%s: %s (%s): %.200s\n%s", at, v.ID, v.Help, n.HTML, n.Why)
		}
	}
}

// TestLargeMesh times the map of 1,000 services, from the click until it is
// drawn: the median of five.
func TestLargeMesh(t *testing.T) {
	tell(t)
	b := openTab(t, 1000)
	var took []time.Duration
	for range 5 {
		b.visit("/denied")
		ms := evaluate[float64](b, `new Promise((done) => {
			const start = performance.now();
			const seen = new MutationObserver(() => {
				if (document.documentElement.dataset.shown !== "/map") return;
				seen.disconnect();
				document.querySelector("#drawing svg").getBoundingClientRect();
				requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
			});
			seen.observe(document.documentElement, {attributes: true});
			document.querySelector('nav a[href="/map"]').click();
		})`)
		took = append(took, time.Duration(ms*float64(time.Millisecond)))
	}
	slices.Sort(took)
	figures.map1000 = took[2]
	t.Logf("%v", took)
	if n := b.text(`String(document.querySelectorAll("#drawing rect").length)`); len(n) > 3 || n == "0" {
		t.Errorf("%s nodes are drawn", n)
	}
	for _, theme := range []string{"light", "dark"} {
		b.theme(theme)
		b.shoot("map-1000-" + theme)
	}
	// A machine that does other things meanwhile says nothing of the page.
	if took[0] > 5*time.Second {
		t.Errorf("the map took %s at best", took[0])
	}
	b.calm()
}
