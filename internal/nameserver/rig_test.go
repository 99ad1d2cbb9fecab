package nameserver

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
	"sallyport/internal/virtual"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("corp.example")
	payment = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/payment")
	web     = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/web")
	billing = spiffeid.RequireFromString("spiffe://corp.example/ns/shop/sa/billing")
)

// A row out: its id, who, whereto, effect.
func row(id, src, host string, eft mesh.Effect) mesh.Rule {
	return mesh.Rule{ID: id, Dir: mesh.Out, Src: src, Dst: "host:" + host, Port: "*", Verb: "*", Path: "**", Cond: "-", Effect: eft}
}

var testSnapshot = &mesh.Snapshot{
	Revision: 1, PolicyRevision: 7, TrustDomain: td,
	Services: []mesh.Service{{Name: "billing", ID: billing, Port: 8443, Protocol: mesh.HTTP}},
	Endpoints: []mesh.Endpoint{
		{Service: "billing", Address: netip.MustParseAddrPort("10.0.0.7:15006")}, {Service: "billing", Address: netip.MustParseAddrPort("10.0.0.8:15006")},
		{Service: "billing", Address: netip.MustParseAddrPort("[fd01::7]:15006")},
	},
	Rules: []mesh.Rule{
		row("out-api", payment.String(), "api.example.com", mesh.Allow),
		row("out-wild", payment.String(), "*.wild.example.com", mesh.Allow),
		row("out-real", payment.String(), "real.example.com", mesh.Allow),
		row("guard-bad", "**", "bad.wild.example.com", mesh.Deny),
	},
}

// A rig is Names of the policy above with what they have recorded.
type rig struct {
	*Names
	t       testing.TB
	metrics *telemetry.Registry

	mu      sync.Mutex // guards records
	records []audit.Record
}

func newRig(t testing.TB, change func(*Config)) *rig {
	t.Helper()
	book, err := virtual.Open(filepath.Join(t.TempDir(), "addresses.json"), netip.MustParsePrefix("247.0.0.0/8"), netip.MustParsePrefix("fd00:e::/64"))
	if err != nil {
		t.Fatal(err)
	}
	set, err := authz.Compile(testSnapshot)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, metrics: telemetry.NewRegistry()}
	cfg := Config{Book: book, Log: slog.New(slog.DiscardHandler), Metrics: r.metrics, Mesh: true, Endpoints: true, Search: []string{"ns1.svc.cluster.local", "cluster.local."}, Record: func(rec *audit.Record) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.records = append(r.records, *rec)
		return nil
	}}
	if change != nil {
		change(&cfg)
	}
	if r.Names, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	if err := book.Use([]string{"billing.mesh.internal"}); err != nil {
		t.Fatal(err)
	}
	r.Use(testSnapshot, set)
	return r
}

// recorded gives what was recorded so far, in short.
func (r *rig) recorded() (out []string) {
	r.tell()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.records {
		out = append(out, fmt.Sprintf("%s %s %s %s", rec.Decision, rec.Dst, rec.Reason, rec.Rule))
	}
	return out
}

// question writes one; with size it knows EDNS.
func ask(name string, typ uint16, size uint16) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(name, typ)
	if size > 0 {
		m.SetEdns0(size, false)
	}
	return m
}

// both has a message answered the quick way, if that is possible, and the slow
// way, and has them agree.
func (r *rig) both(who spiffeid.ID, in []byte) (answer *dns.Msg, quick bool) {
	r.t.Helper()
	a := r.answerer(who, 64)
	slow, _ := a.answer(context.Background(), in, false)
	b := make([]byte, room)
	n := copy(b, in)
	size, _ := a.quick(b, n)
	if size == 0 {
		if slow == nil {
			return nil, false
		}
		return unpack(r.t, slow), false
	}
	got, want := unpack(r.t, b[:size]), unpack(r.t, slow)
	if got.String() != want.String() {
		r.t.Fatalf("the quick way answers %x\n%s\nthe slow way\n%s", in, got, want)
	}
	if len(slow) > size+64 || size > minSize {
		r.t.Fatalf("the quick answer has %d bytes, the slow one %d", size, len(slow))
	}
	return got, true
}

func unpack(t testing.TB, b []byte) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("answer %x: %v", b, err)
	}
	return m
}

func pack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// short says in a line what an answer says.
func short(m *dns.Msg) string {
	if m == nil {
		return "nothing"
	}
	out := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		out = append(out, strings.Join(strings.Fields(strings.TrimPrefix(rr.String(), rr.Header().String())), " "))
	}
	if len(m.Ns) == 1 {
		out = append(out, "SOA of "+m.Ns[0].Header().Name)
	}
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if e, ok := o.(*dns.EDNS0_EDE); ok {
				out = append(out, fmt.Sprintf("EDE %d: %s", e.InfoCode, e.ExtraText))
			}
		}
	}
	return strings.Join(out, " | ")
}
