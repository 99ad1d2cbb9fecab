// Bench-memory measures what a real sidecar holds in memory: at rest after its
// start with a policy of many rows, and then for each connection of mutual TLS
// that has carried one call and stays open, of HTTP/1.1 and of sallyport/1 with
// one stream.
//
// It prints what it did, a table, and a line of JSON. Memory is the resident set
// as the kernel counts it, some seconds after the last connection was made.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"sallyport/bench/rig"
	"sallyport/internal/hop"
)

func main() {
	rig.Main("bench-memory", measure, map[string]rig.Role{"origin": rig.At(func(at string) error {
		return http.ListenAndServe(at, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	})})
}

const (
	bound = 10 * time.Minute
	// settle is how long the sidecars are left alone before they are looked at.
	settle = 10 * time.Second
	// makers is how many connections are made at a time.
	makers = 16
)

type settings struct {
	issuer, sidecar string
	rules, conns    int
	heap            string
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.sidecar, "sidecar", "bin/sidecar", "the sidecar's binary")
	flag.IntVar(&s.rules, "rules", 1000, "rows of the policy")
	flag.IntVar(&s.conns, "conns", 10_000, "connections of each kind")
	flag.StringVar(&s.heap, "heap", "", "write what lives in the sidecar beside connections of HTTP/1.1 to this file")
	flag.Parse()
	if s.rules < 1 || s.conns < 1 {
		return errors.New("settings: want at least one rule and one connection")
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	m, err := start(ctx, s)
	if err != nil {
		return err
	}
	defer m.stop()
	fmt.Fprintf(w, "settings: %s, %d cores; %d rows; %d connections of each kind, each at rest after one call; looked at %s later\n", runtime.Version(), runtime.NumCPU(), s.rules, s.conns, settle)
	res := &rig.Result{Name: "bench-memory", Figures: map[string]float64{}}
	if err := m.all(ctx, w, s, res); err != nil {
		return err
	}
	return res.End(w, "not every connection was answered")
}

// A mesh is an issuer, a sidecar, and an identity to call it by.
type mesh struct {
	issuer *rig.Issuer
	server *rig.Process
	listen string
	tls    *tls.Config
}

func (m *mesh) stop() {
	if m.server != nil {
		m.server.Stop()
	}
	_ = m.issuer.Close() // a directory that stays says so by itself
}

func start(ctx context.Context, s settings) (_ *mesh, err error) {
	m := &mesh{}
	if m.issuer, err = rig.Start(ctx, rig.Config{Program: s.issuer, Files: policy(s.rules)}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.stop()
		}
	}()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if m.listen, err = rig.FreePort(); err != nil {
		return nil, err
	}
	app, err := rig.FreePort()
	if err != nil {
		return nil, err
	}
	conf := fmt.Sprintf("limits: {connections: %d, peer_connections: %d}\ninbound: {listen: %q, app: %q}\npprof: %t\n", 4*s.conns, 4*s.conns, m.listen, app, s.heap != "")
	if m.server, err = m.issuer.Sidecar(ctx, s.sidecar, "server", conf, self, "origin", app); err != nil {
		return nil, err
	}
	if err = m.server.Await(ctx, "tcp", app, m.listen); err != nil {
		return nil, err
	}
	m.tls, err = m.identity(ctx)
	return m, err
}

// identity is that of the client, issued to a node of the bench.
func (m *mesh) identity(ctx context.Context) (*tls.Config, error) {
	cert, err := m.issuer.Identity(ctx, "crowd")
	if err != nil {
		return nil, err
	}
	// Whom it reaches is no question of this bench.
	return &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{*cert}}, nil
}

func policy(rows int) map[string]string {
	id := func(name string) string { return "spiffe://" + rig.TrustDomain.Name() + "/ns/bench/sa/" + name }
	var access strings.Builder
	for n := range rows - 1 {
		fmt.Fprintf(&access, "p, r%d, in, %s, %s, 8443, GET|POST, /v2/thing-%d/**, -, allow\n", n, id("client"), id("origin"), n)
	}
	fmt.Fprintf(&access, "p, get, in, %s, %s, 8443, GET, /v1/**, -, allow\n", id("client"), id("origin"))
	return map[string]string{
		"entries.yaml": fmt.Sprintf("entries:\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n",
			id("client"), rig.Agent("crowd"), id("origin"), rig.Agent("server")),
		"services.yaml": fmt.Sprintf("services:\n  - {name: origin, identity: %q, port: 8443, protocol: http}\n", id("origin")),
		"access.csv":    access.String(), "guardrails.csv": "", "egress.yaml": "destinations: []\n",
	}
}

// all looks at the sidecar at rest, and with each kind of connections.
func (m *mesh) all(ctx context.Context, w io.Writer, s settings, res *rig.Result) error {
	idle, err := m.rss(ctx)
	if err != nil {
		return err
	}
	res.Figures["idle_rss_mb"] = idle
	fmt.Fprintf(w, "at rest: %.1f MB\n", idle)
	for _, kind := range []struct{ proto, figure string }{
		{"http/1.1", "kb_per_idle_conn"}, {hop.Proto, "kb_per_idle_hop_conn"},
	} {
		before, err := m.rss(ctx)
		if err != nil {
			return err
		}
		open, failed := m.crowd(ctx, kind.proto, s.conns)
		res.Cases.Tried += int64(s.conns)
		res.Cases.Passed += int64(len(open))
		res.Cases.Failed += int64(s.conns - len(open))
		if failed != nil {
			fmt.Fprintf(w, "%s: %d connections failed: %v\n", kind.proto, s.conns-len(open), failed)
		}
		with, err := m.rss(ctx)
		if s.heap != "" && kind.proto != hop.Proto && err == nil {
			err = m.server.Heap(ctx, s.heap)
		}
		for _, c := range open {
			_ = c.Close()
		}
		if err != nil {
			return err
		}
		each := (with - before) * 1e6 / 1024 / float64(max(len(open), 1))
		res.Figures[kind.figure] = each
		fmt.Fprintf(w, "%d connections of %s: %.1f MB, %.1f KB each\n", len(open), kind.proto, with, each)
	}
	return nil
}

// rss is what the sidecar has, once it was left alone for some time.
func (m *mesh) rss(ctx context.Context) (float64, error) {
	select {
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-time.After(settle):
	}
	return rig.RSSOf(m.server.PIDs(false)...)
}

// crowd makes so many connections and one call on each.
func (m *mesh) crowd(ctx context.Context, proto string, conns int) (open []io.Closer, failed error) {
	var mu sync.Mutex
	var all sync.WaitGroup
	turns := make(chan struct{}, conns)
	for range conns {
		turns <- struct{}{}
	}
	close(turns)
	for range makers {
		all.Go(func() {
			for range turns {
				c, err := m.call(ctx, proto)
				mu.Lock()
				if err == nil {
					open = append(open, c)
				} else {
					failed = err
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return open, failed
}

// call makes a connection that has carried one call.
func (m *mesh) call(ctx context.Context, proto string) (io.Closer, error) {
	conf := m.tls.Clone()
	conf.NextProtos = []string{proto}
	nc, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", m.listen)
	if err != nil {
		return nil, err
	}
	if proto != hop.Proto {
		return nc, get(nc)
	}
	h := hop.Dialled(nc, hop.Config{})
	go h.Run() //nolint:errcheck // the call says whether it works
	s, err := h.Open()
	if err != nil {
		return nil, err
	}
	return closer(h.Close), get(s)
}

type closer func()

func (c closer) Close() error {
	c()
	return nil
}

// get makes a call that is allowed.
func get(c net.Conn) error {
	if _, err := c.Write([]byte("GET /v1/x HTTP/1.1\r\nHost: origin.mesh.internal\r\n\r\n")); err != nil {
		return err
	}
	const want = "HTTP/1.1 200"
	buf := make([]byte, 1024) // the answer has no body, and fits
	n, err := io.ReadAtLeast(c, buf, len(want))
	if err == nil && string(buf[:len(want)]) != want {
		err = fmt.Errorf("answered %q", buf[:n])
	}
	return err
}
