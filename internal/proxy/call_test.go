package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/meshtest"
)

// onCall is a call on a connection whose other end nobody reads.
func onCall(t *testing.T, r *rig) *call {
	t.Helper()
	here, there := meshtest.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	if _, err := there.Write([]byte("GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	x := &call{ctx: context.Background(), on: &r.inbound.listener, conn: &conn{Conn: here}, down: http1.NewConn(here, http1.Limits{}), dst: r.inbound.self, port: 8443}
	if err := x.down.ReadRequest(&x.req); err != nil {
		t.Fatal(err)
	}
	x.reset()
	return x
}

func TestErrorBodyIsJSON(t *testing.T) {
	for _, c := range []struct{ detail, decision, want string }{
		{"no", "", "no"},
		{`a "quoted" \ word`, "", `a "quoted" \ word`},
		{"line\r\nfeed\x00\x7f\xff", "", "line\r\nfeed\x00\x7f\ufffd"},
		{"never shown", "k3v9q2-1f", "denied by policy"},
	} {
		var got struct{ Error, Decision string }
		b := errorBody(c.detail, c.decision)
		if err := json.Unmarshal(b, &got); err != nil {
			t.Errorf("%q: %v", b, err)
		}
		if got.Error != c.want || got.Decision != c.decision {
			t.Errorf("%q: got %+v", c.detail, got)
		}
	}
}

// Nothing reaches the application without a Grant for that very call.
func TestHandOverNeedsTheGrant(t *testing.T) {
	var called atomic.Bool
	r := newRig(t, rawApp(t, func(net.Conn, *bufioReader) { called.Store(true) }))
	x := onCall(t, r)
	got := r.inbound.handOver(x, x.grant)
	if got == nil || got.status != 500 || called.Load() {
		t.Errorf("a call without Grant got %+v, application called: %v", got, called.Load())
	}
}

func TestDenyThatCannotBeRecordedIsNoDecision(t *testing.T) {
	for name, a := range map[string]Recorder{
		"error": recorder(func(*audit.Record) error { return errors.New("disk full") }),
		"no id": recorder(func(*audit.Record) error { return nil }),
	} {
		l := &listener{Shared: Shared{Audit: a, Log: quiet}}
		if r := l.deny(audit.Record{Reason: "no_route"}); r.status != 503 || r.reason != "audit" || r.decision != "" {
			t.Errorf("%s: got %+v", name, r)
		}
	}
}

type recorder func(*audit.Record) error

func (f recorder) Append(r *audit.Record) error { return f(r) }

func TestIdempotent(t *testing.T) {
	for m, want := range map[string]bool{"GET": true, "PUT": true, "DELETE": true, "HEAD": true, "OPTIONS": true, "POST": false, "PATCH": false, "get": false, "": false, "LOCK": false} {
		if idempotent([]byte(m)) != want {
			t.Errorf("%q: want %v", m, want)
		}
	}
}

func TestServiceOf(t *testing.T) {
	for in, want := range map[string]string{
		"billing.mesh.internal": "billing", "billing.mesh.internal:80": "billing", "billing.mesh.internal.": "billing",
		"a.b.mesh.internal": "a.b", ".mesh.internal": "", "mesh.internal": "-", "billing": "-", "[::1]:80": "-",
		"billing.mesh.internal.evil.test": "-", "evilmesh.internal": "-", "": "-",
	} {
		got, inside := serviceOf([]byte(in))
		if !inside {
			got = "-"
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestIsDecision(t *testing.T) {
	for in, want := range map[string]bool{"k3v9q2-1f": true, "": false, "a b": false, "a\"": false, "A": false, "é": false} {
		if isDecision([]byte(in)) != want {
			t.Errorf("%q: want %v", in, want)
		}
	}
}

func TestConfigNamesWhatIsMissing(t *testing.T) {
	_, err := NewInbound(InboundConfig{})
	if err == nil || !has(err.Error(), "audit: missing", "log: missing", "self: missing", "judge: missing", "app: missing", "tls: missing", "peer id: missing", "port: missing") {
		t.Errorf("inbound: %v", err)
	}
	if _, err = NewOutbound(OutboundConfig{}); err == nil || !has(err.Error(), "audit: missing", "local: missing", "snapshot: missing", "services: missing") {
		t.Errorf("outbound: %v", err)
	}
	r := newRig(t, "127.0.0.1:1")
	r.inCfg.TLS = r.inCfg.TLS.Clone()
	r.inCfg.TLS.VerifyConnection = nil
	if _, err := NewInbound(r.inCfg); err == nil || !has(err.Error(), "VerifyConnection") {
		t.Errorf("TLS that checks nobody: %v", err)
	}
}
