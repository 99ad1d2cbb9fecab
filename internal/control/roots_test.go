package control

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// mover is a RootKeeper that remembers what it was told.
type mover struct {
	tainted []*x509.Certificate
	status  RootStatus
	moves   []string
	err     error
}

func (k *mover) TaintedX509() []*x509.Certificate { return k.tainted }
func (k *mover) Roots() RootStatus                { return k.status }
func (k *mover) MoveRoots(_ context.Context, m Move, force, through bool) (RootStatus, error) {
	k.moves = append(k.moves, string(m))
	return k.status, k.err
}

func (k *mover) MoveAuthority(_ context.Context, kind, step, id string) (RootStatus, error) {
	k.moves = append(k.moves, kind+" "+step+" "+id)
	return k.status, k.err
}

func TestTheOperatorMovesTheRoot(t *testing.T) {
	k := &mover{status: RootStatus{
		Phase: "tainted", Pace: "once", Since: time.Unix(1e9, 0).UTC(), Emergency: true, Next: "revoke",
		Authorities: []AuthorityStatus{{ID: "ab", Kind: "x509", Expires: time.Unix(2e9, 0).UTC(), Signs: true}, {ID: "k1", Kind: "jwt", Next: true, Tainted: true}},
		Confirmed:   1, Live: 2, IssuersConfirmed: 1, IssuersLive: 3, Stragglers: []string{"spiffe://x/y"}, Known: true, NotBefore: time.Unix(3e9, 0).UTC(), Due: time.Unix(4e9, 0).UTC(),
	}}
	r := newRig(t, newCA(t, td), func(c *ServerConfig) { c.Roots = k })
	a := r.admin()
	got, err := a.Roots(t.Context())
	if d := cmp.Diff(k.status, got); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	for _, m := range []Move{MoveRotate, MoveRollback, MoveEmergency} {
		if _, err := a.MoveRoots(t.Context(), m, false, false); err != nil {
			t.Errorf("%s: %v", m, err)
		}
	}
	k.err = errors.New("1 of 2 proxies confirm, not yet spiffe://x/y")
	if _, err := a.MoveRoots(t.Context(), MoveRotate, false, false); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "1 of 2 proxies confirm") {
		t.Errorf("got %v, want ErrRefused with the cause", err)
	}
	if _, err := a.MoveRoots(t.Context(), "twist", false, false); !errors.Is(err, ErrRefused) {
		t.Errorf("an unknown move: %v", err)
	}
	if d := cmp.Diff([]string{"rotate", "rollback", "emergency", "rotate"}, k.moves); d != "" {
		t.Error(d)
	}
	if _, err := newRig(t, newCA(t, td)).admin().Roots(t.Context()); !errors.Is(err, ErrRefused) {
		t.Errorf("an issuer that keeps no root: %v", err)
	}
}

func TestTaintedRootsStayTrustedAndAreNamed(t *testing.T) {
	a := newCA(t, td)
	r := newRig(t, a, func(c *ServerConfig) { c.Roots = &mover{tainted: []*x509.Certificate{a.root}} })
	c, _ := r.joined("node-a")
	b, err := c.GetBundle(t.Context())
	if err != nil || len(b.X509) != 1 || len(b.Tainted) != 1 || !b.Tainted[0].Equal(a.root) {
		t.Errorf("%+v, %v", b, err)
	}
}

func TestAProxySaysWhatItTrustsAndShows(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-b")
	h := billingHello()
	says := &mesh.Authorities{Trusts: []string{"a", "b"}, Shows: []string{"a"}}
	h.Authorities = func() *mesh.Authorities { return says }
	subscribe(t, c, h, newWatcher())
	for _, when := range []string{"in its hello", "in its ack"} {
		p := report(t, r, when, func(mesh.Proxy) bool { return true })
		if d := cmp.Diff(says, p.Authorities); d != "" {
			t.Errorf("%s: %s", when, d)
		}
	}
}

func TestAuthoritiesOutOfBoundsAreNotSaid(t *testing.T) {
	for name, w := range map[string]*meshpb.Authorities{
		"too many":  {Trusts: make([]string, maxAuthorities+1)},
		"empty":     {Shows: []string{""}},
		"too long":  {Trusts: []string{strings.Repeat("a", maxAuthority+1)}},
		"none said": nil,
	} {
		if got := authoritiesFromWire(w); got != nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
