package authz

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

// dice turns bytes into choices; when they run out it always says 0.
type dice struct{ b []byte }

func (d *dice) n(sides int) int {
	if len(d.b) == 0 {
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return int(v) % sides
}

func (d *dice) pick(from ...string) string { return from[d.n(len(from))] }

// The universe is small, so that rows and calls meet.
func (d *dice) td() string { return d.pick("corp.example", "corp.example", "other.example") }

func (d *dice) segments(wild bool) string {
	var s []string
	for range 1 + d.n(3) {
		if wild {
			s = append(s, d.pick("a", "b", "*", "a"))
		} else {
			s = append(s, d.pick("a", "b", "c"))
		}
	}
	if wild && d.n(3) == 0 {
		s = append(s, "**")
	}
	return strings.Join(s, "/")
}

func (d *dice) host() string {
	return d.pick("x.test", "y.x.test", "z.x.test", "z.y.x.test", "x.example", "test")
}

func (d *dice) src() string {
	switch d.n(6) {
	case 0:
		return "**"
	case 1:
		return d.pick("group:a", "group:b", "group:c")
	case 2, 3:
		return "spiffe://" + d.td() + "/" + d.segments(true)
	}
	return "spiffe://" + d.td() + "/" + d.segments(false)
}

func (d *dice) dst(dir mesh.Direction) string {
	if dir == mesh.Out {
		switch d.n(4) {
		case 0:
			return d.pick("hosts:a", "hosts:b")
		case 1:
			return "host:*." + d.pick("x.test", "y.x.test")
		}
		return "host:" + d.host()
	}
	switch d.n(6) {
	case 0:
		return d.pick("*", "**")
	case 1:
		return d.pick("svcs:a", "svcs:b")
	case 2:
		return "spiffe://corp.example/" + d.segments(true)
	}
	return "spiffe://corp.example/" + d.segments(false)
}

func (d *dice) row(i int) mesh.Rule {
	r := mesh.Rule{ID: fmt.Sprintf("r%d", i), Dir: mesh.In, Effect: mesh.Allow}
	if d.n(3) == 0 {
		r.Dir = mesh.Out
	}
	if d.n(4) == 0 {
		r.Effect = mesh.Deny
	}
	r.Src, r.Dst = d.src(), d.dst(r.Dir)
	r.Port = d.pick("*", "443", "443", "8443", "65535")
	r.Verb = d.pick("*", "GET", "GET|POST", "POST|DELETE|PUT", "CONNECT", "GET|HEAD|PATCH|OPTIONS|TRACE")
	r.Path = d.pick("**", "/**", "/", "/v1/**", "/v1/*", "/v1/*/x", "/v1/*/**", "/v1", "/v1/", "/v1/a", "/*", "/*/**", "/v1/a/x", "/v1/%20")
	if r.Verb == "CONNECT" {
		r.Path = d.pick("-", "**")
	}
	r.Cond = d.pick("-", "-", "-", "iss=https://i", "aud=x scope~s", "claim.k=v", "acr>=1", "bound", "env.name=prod",
		"when=Mon-Fri/08:00-18:00", "until=2026-11-23T10:00:00Z", "unless.src=spiffe://corp.example/a/**")
	if r.Dir == mesh.Out && d.n(4) == 0 {
		r.Cond = "env.sni=same"
	}
	return r
}

// snapshot has every group, so that no row names an unknown one.
func (d *dice) snapshot(rows int) *mesh.Snapshot {
	s := &mesh.Snapshot{TrustDomain: spiffeid.RequireTrustDomainFromString("corp.example")}
	seen := map[string]bool{}
	add := func(kind mesh.GroupKind, member, group string) {
		if !seen[member+group] {
			seen[member+group] = true
			s.Memberships = append(s.Memberships, mesh.Membership{Kind: kind, Member: member, Group: group})
		}
	}
	for _, g := range []string{"group:a", "group:b", "group:c"} {
		for range 1 + d.n(3) {
			add(mesh.CallerGroup, "spiffe://"+d.td()+"/"+d.segments(false), g)
		}
	}
	if d.n(2) == 0 {
		add(mesh.CallerGroup, "group:a", "group:b")
		add(mesh.CallerGroup, "group:b", "group:c")
	}
	for _, g := range []string{"a", "b"} {
		for range 1 + d.n(3) {
			add(mesh.DestinationGroup, "spiffe://corp.example/"+d.segments(false), "svcs:"+g)
			add(mesh.DestinationGroup, "host:"+d.pick("x.test", "y.x.test", "x.example"), "hosts:"+g)
		}
	}
	if d.n(2) == 0 {
		add(mesh.DestinationGroup, "hosts:a", "hosts:b")
		add(mesh.DestinationGroup, "svcs:a", "svcs:b")
	}
	for i := range rows {
		s.Rules = append(s.Rules, d.row(i))
	}
	return s
}

func (d *dice) call() *Call {
	c := &Call{
		Dir: mesh.In, Src: spiffeid.RequireFromString("spiffe://" + d.td() + "/" + d.segments(false)),
		Dst: "spiffe://corp.example/" + d.segments(false), Port: []uint16{443, 443, 8443, 65535, 1, 0}[d.n(6)],
		Verb: d.pick("GET", "GET", "POST", "DELETE", "HEAD", "TRACE", "get", "PROPFIND", ""),
		Path: d.pick("/v1", "/v1/", "/", "/v1/a", "/v1/b", "/v1/a/x", "/v1/a/x/y", "/w", "/w/a", "-", "/v1//a", "/v1/../a", "/v1/%20", "/v1/%2f", "", "v1"),
		Now:  time.Date(2026, 11, 22+d.n(3), 6*d.n(4), 0, 0, 0, time.UTC),
	}
	if d.n(3) == 0 {
		c.Dir, c.Dst = mesh.Out, "host:"+d.host()
		c.SNI = d.host()
		if d.n(2) == 0 {
			c.Verb, c.Path = "CONNECT", "-"
		}
	}
	if d.n(8) == 0 {
		c.Dst = d.pick("", "host:", "spiffe://", "host:.test", "host:a.", "spiffe://corp.example", "spiffe://corp.example/", "group:a", "svcs:a", "*", "**", "host:*.x.test", "spiffe://corp.example/a//b", "spiffe://corp.example/*")
	}
	if d.n(2) == 0 {
		c.Token = &Token{
			Issuer: d.pick("https://i", "https://j"), Audience: []string{d.pick("x", "y")}, ACR: d.n(3), Bound: d.n(2) == 0,
			Scopes: map[string]bool{d.pick("s", "t"): true}, Claims: map[string]string{d.pick("k", "l"): d.pick("v", "w")},
		}
	}
	c.Environment = d.pick("", "prod")
	return c
}

// FuzzOracle makes a small policy and calls of the input and asks index, slice,
// Casbin and explanation: all must give one answer.
func FuzzOracle(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		b := make([]byte, 400)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d := &dice{b}
		s, err := Compile(d.snapshot(1 + d.n(12)))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < 16 && (len(d.b) > 0 || i == 0); i++ {
			decide(t, s, d.call())
		}
	})
}

// FuzzIndexText compares with names and paths that nobody would choose.
func FuzzIndexText(f *testing.F) {
	f.Add("spiffe://corp.example/a/b", "/v1/a")
	f.Add("host:y.x.test", "-")
	d := &dice{}
	r := rand.New(rand.NewPCG(3, 4))
	for range 4000 {
		d.b = append(d.b, byte(r.Uint32()))
	}
	s, err := Compile(d.snapshot(120))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, dst, path string) {
		for _, dir := range []mesh.Direction{mesh.In, mesh.Out} {
			decide(t, s, &Call{Dir: dir, Src: pay, Dst: dst, Port: 443, Verb: "GET", Path: path, Now: mon})
		}
	})
}

func TestIndexAgreesWithCasbin(t *testing.T) {
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	calls, allowed, byRule := 0, 0, 0
	rounds := 30
	if meshtest.Race {
		rounds /= 5 // make test takes all of them without
	}
	for range rounds {
		seed := r.Uint64()
		d := &dice{}
		g := rand.New(rand.NewPCG(seed, 5))
		for range 60_000 {
			d.b = append(d.b, byte(g.Uint32()))
		}
		s, err := Compile(d.snapshot(200))
		if err != nil {
			t.Fatal(err)
		}
		for range 500 {
			got := decide(t, s, d.call())
			calls++
			if got.Allow {
				allowed++
			} else if got.Rule != "" {
				byRule++
			}
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if calls < 500*rounds || allowed == 0 || byRule == 0 {
		t.Errorf("of %d calls %d were allowed and %d denied by a row: the universe is not worth the test", calls, allowed, byRule)
	}
	t.Logf("%d calls, %d allowed, %d denied by a row", calls, allowed, byRule)
}
