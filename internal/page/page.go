// Package page serves the operator's page: what is denied now, the map of who
// calls whom, services, rollouts, the egress ledger, the audit, the CA, and what is amiss.
//
// Every view is rendered here, from what the issuer knows; the browser swaps
// what it is sent and lays nothing out. It holds no state but who has entered.
// Nothing is served to whom the policy gives no right, and every write is
// recorded before it acts. It starts no goroutine but what Run does; a live view takes that of its
// request.
package page

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

//go:embed assets
var assets embed.FS

// The methods that a row of admin.csv gives or takes, as those of calls.
const (
	// MethodView is to see the page, MethodMoveRollout to promote or abort the
	// rollout of a route.
	MethodView        = "page.View"
	MethodMoveRollout = "page.MoveRollout"
	// methodMoveMesh is the same by another way: who may not there may not here.
	methodMoveMesh = "mesh.MoveRollout"
	methodEnter    = "page.Enter"
)

// Limits of what one page serves.
const (
	maxStreams = 64
	maxBody    = 4 << 10
	// renderEvery is how often a live view looks for news, pingEvery how often it
	// says that it lives.
	renderEvery = 2 * time.Second
	pingEvery   = 15 * time.Second
)

// A Denial is what was refused again and again in the same way.
type Denial struct {
	authz.Recorded
	N           uint64
	First, Last time.Time
}

// A Passage is a tunnel to a host outside, or one that was refused.
type Passage struct {
	ID, Src, Dst, Rule, Reason string
	Port                       uint16
	// State is "open", "closed" or "refused".
	State     string
	Opened    time.Time
	Took      time.Duration
	Up, Down  int64
	Detail    string
	Completed time.Time
}

// A Log is the issuer's own audit log, or its copy of a proxy's.
type Log struct {
	Name string
	// Records are continuous up to Seq; Signed of them are under a checkpoint
	// that an issuer has signed.
	Seq, Signed uint64
	SignedAt    time.Time
	// Broken says that lines came that do not continue it.
	Broken bool
}

// A Hit is a record that a search has found.
type Hit struct {
	audit.Record
	Log string
}

// Found is what a search has found, the newest first.
type Found struct {
	Hits []Hit
	// Partial says why not everything was searched; empty when it was.
	Partial string
}

// A Config says where a Page gets what it shows. All functions are quick, safe
// for concurrent use and required, but where said otherwise.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Status      func() mesh.IssuerStatus
	Proxies     func() []mesh.Proxy
	Policies    func() *mesh.Policies
	Chart       func(ctx context.Context, from, to time.Time) (mesh.Chart, error)
	// Windows have the calls from and to one end.
	Windows     func(ctx context.Context, from, to time.Time, end string) ([]mesh.Window, error)
	Denials     func() []Denial
	Passages    func() []Passage
	Rollouts    func(ctx context.Context) ([]mesh.Delivery, error)
	MoveRollout func(ctx context.Context, m control.RolloutMove) (mesh.Delivery, error)
	Roots       func() control.RootStatus
	Logs        func(ctx context.Context) ([]Log, error)
	Search      func(ctx context.Context, f audit.Filter) (Found, error)
	// Admins judges who may do what.
	Admins control.AdminJudge
	// OnAdmin records who enters and every write, before it is made. An error
	// refuses it.
	OnAdmin func(context.Context, control.AdminCall) error
	// Revoked says if the SVID of a serial number is. Default: none is.
	Revoked func(serial string) bool
	// Loopback is the address of a listener on this machine alone, whose visitors
	// bring a link of NewLink. Otherwise they prove an identity by mutual TLS.
	Loopback string
	// OIDC, when set, lets people enter by a provider as well; not with Loopback. Run
	// must be running then.
	OIDC *OIDC
	// Version is what the issuer was built from; empty when it is not known.
	Version string
	Log     *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Validate reports every function that is missing.
func (c Config) Validate() error {
	var errs []error
	for name, missing := range map[string]bool{
		"status": c.Status == nil, "proxies": c.Proxies == nil, "policies": c.Policies == nil, "chart": c.Chart == nil, "windows": c.Windows == nil,
		"denials": c.Denials == nil, "passages": c.Passages == nil, "rollouts": c.Rollouts == nil, "move rollout": c.MoveRollout == nil,
		"roots": c.Roots == nil, "logs": c.Logs == nil, "search": c.Search == nil, "admins": c.Admins == nil, "on admin": c.OnAdmin == nil, "log": c.Log == nil,
	} {
		if missing {
			errs = append(errs, fmt.Errorf("%s: missing", name))
		}
	}
	if c.OIDC != nil && c.Loopback != "" {
		errs = append(errs, errors.New("oidc: a page on a loopback address is entered by a link alone"))
	}
	return errors.Join(errs...)
}

// A Page serves the operator. It is safe for concurrent use.
type Page struct {
	cfg     Config
	door    door
	views   *template.Template
	streams atomic.Int32
	crowd   crowd
	charts  charts
	started time.Time
	// provider is nil when people enter by none.
	provider *provider
	redeems  redeems
}

// New makes a Page.
func New(cfg Config) (*Page, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("page: %w", err)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Revoked == nil {
		cfg.Revoked = func(string) bool { return false }
	}
	t, err := template.New("views").Funcs(funcs).ParseFS(assets, "assets/*.tmpl")
	if err != nil {
		return nil, fmt.Errorf("page: %w", err)
	}
	p := &Page{cfg: cfg, views: t, started: cfg.Now()}
	p.charts.making, p.charts.list = make(chan struct{}, chartsAtOnce), map[chartKey]*drawn{}
	p.door.init()
	if cfg.OIDC != nil {
		p.redeems.init()
		if p.provider, err = newProvider(*cfg.OIDC, cfg.Log); err != nil {
			return nil, fmt.Errorf("page: %w", err)
		}
	}
	return p, nil
}

// Handler serves the page.
func (p *Page) Handler() http.Handler {
	mux := http.NewServeMux()
	for _, a := range []struct{ name, kind string }{
		{"app.js", "text/javascript; charset=utf-8"}, {"app.css", "text/css; charset=utf-8"}, {"icon.svg", "image/svg+xml"},
	} {
		mux.HandleFunc("GET /assets/"+a.name, func(w http.ResponseWriter, _ *http.Request) { p.asset(w, a.name, a.kind) })
	}
	mux.HandleFunc("POST /session", p.enter)
	mux.HandleFunc("GET /session", p.guard(p.session))
	mux.HandleFunc("POST /rollout", p.guard(p.moveRollout))
	if p.provider != nil {
		mux.HandleFunc("GET /oidc/signin", p.signin)
		mux.HandleFunc("GET /oidc/callback", p.signedIn)
	}
	for _, v := range views {
		mux.HandleFunc("GET /"+v.path, func(w http.ResponseWriter, _ *http.Request) { p.asset(w, "index.html", "text/html; charset=utf-8") })
		mux.HandleFunc("GET /view/"+v.path, p.guard(func(w http.ResponseWriter, r *http.Request, c *visitor) { p.view(w, r, c, v) }))
		if v.still {
			continue
		}
		mux.HandleFunc("GET /live/"+v.path, p.guard(func(w http.ResponseWriter, r *http.Request, c *visitor) { p.live(w, r, c, v) }))
	}
	mux.Handle("GET /{$}", http.RedirectHandler("/denied", http.StatusSeeOther))
	return p.secured(mux)
}

// secured sets what every answer has, and refuses a request by a name that is
// not the listener's: another site could have its own name lead here.
func (p *Page) secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if p.cfg.Loopback != "" && !p.ownHost(r.Host) {
			http.Error(w, "this page is at http://"+p.cfg.Loopback, http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (p *Page) ownHost(host string) bool {
	_, port, err := net.SplitHostPort(p.cfg.Loopback)
	return host == p.cfg.Loopback || err == nil && host == net.JoinHostPort("localhost", port)
}

func (p *Page) asset(w http.ResponseWriter, name, kind string) {
	b, err := assets.ReadFile("assets/" + name)
	if err != nil {
		http.Error(w, "not found", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", kind)
	_, _ = w.Write(b) // who has gone misses nothing
}

// view answers with one view as it is now.
func (p *Page) view(w http.ResponseWriter, r *http.Request, c *visitor, v view) {
	b, err := p.render(r, c, v)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(b)
}

// errAsk wraps what is wrong with a request, for its sender.
var errAsk = errors.New("request")

func (p *Page) fail(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, errAsk) {
		http.Error(w, strings.TrimPrefix(err.Error(), errAsk.Error()+": "), http.StatusBadRequest)
		return
	}
	if errors.Is(err, errBusy) {
		http.Error(w, err.Error(), http.StatusTooManyRequests)
		return
	}
	if r.Context().Err() == nil {
		p.cfg.Log.Error("page not served", "path", r.URL.Path, "err", err)
	}
	http.Error(w, "internal; the issuer's log says what", http.StatusInternalServerError)
}

func (p *Page) render(r *http.Request, c *visitor, v view) ([]byte, error) {
	data, err := v.data(p, r, c)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := p.views.ExecuteTemplate(&b, v.path, data); err != nil {
		return nil, fmt.Errorf("render %s: %w", v.path, err)
	}
	return b.Bytes(), nil
}

// live sends a view as it is now and whenever it has changed, as server-sent
// events.
func (p *Page) live(w http.ResponseWriter, r *http.Request, c *visitor, v view) {
	if p.streams.Add(1) > maxStreams {
		p.streams.Add(-1)
		http.Error(w, "too many live views; close some", http.StatusServiceUnavailable)
		return
	}
	defer p.streams.Add(-1)
	end, ok := p.crowd.begin(c, "live", maxStreamsEach)
	if !ok {
		http.Error(w, fmt.Sprintf("you have %d live views open; close one", maxStreamsEach), http.StatusTooManyRequests)
		return
	}
	defer end()
	flow := http.NewResponseController(w)
	_ = flow.SetReadDeadline(time.Time{}) // the server's own would end the view
	w.Header().Set("Content-Type", "text/event-stream")
	send := func(text string) bool {
		// One that does not read holds its place no longer than this.
		_ = flow.SetWriteDeadline(time.Now().Add(pingEvery))
		_, err := w.Write([]byte(text))
		return err == nil && flow.Flush() == nil
	}
	tick := time.NewTicker(renderEvery)
	defer tick.Stop()
	var last []byte
	for said := time.Now(); ; {
		if !p.standing(c) {
			send("event: out\ndata: {}\n\n")
			return
		}
		b, err := p.render(r, c, v)
		if err != nil {
			p.cfg.Log.Error("live view ended", "path", r.URL.Path, "err", err)
			return
		}
		switch {
		case !bytes.Equal(b, last):
			text, _ := json.Marshal(string(b)) // a string always can be
			if !send("event: view\ndata: " + string(text) + "\n\n") {
				return
			}
			last, said = b, time.Now()
		case time.Since(said) >= pingEvery:
			if !send(": alive\n\n") {
				return
			}
			said = time.Now()
		}
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
		}
	}
}

// moveRollout promotes or aborts.
func (p *Page) moveRollout(w http.ResponseWriter, r *http.Request, c *visitor) {
	var m struct{ Service, Route, Move string }
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil || m.Service == "" || m.Route == "" || m.Move != "promote" && m.Move != "abort" {
		http.Error(w, `want {"service": "...", "route": "...", "move": "promote" or "abort"}`, http.StatusBadRequest)
		return
	}
	if !p.mayWrite(w, r, c) {
		return
	}
	move := control.RolloutMove{Service: mesh.ServiceName(m.Service), Route: m.Route, Move: m.Move, By: c.by()}
	if _, err := p.cfg.MoveRollout(r.Context(), move); err != nil {
		if errors.Is(err, mesh.ErrDelivery) || errors.Is(err, mesh.ErrNotFound) {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		p.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
