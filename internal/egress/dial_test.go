package egress

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// stuck is a resolver that never answers.
type stuck struct{}

func (stuck) Lookup(ctx context.Context, _ string) ([]netip.Addr, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func TestDialTimeout(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Names = stuck{} })
	w.use(w.policy(access, `
  - host: slow.test
    route: {connect_timeout: 20ms}
`))
	if _, ref := dial1(w, billing, "slow.test:443"); ref == nil || ref.status != 504 || ref.id == "" {
		t.Errorf("got %+v", ref)
	}
	w.until("denial", denial(ReasonTimeout))
}

func TestRejudgeEndsADial(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Names = stuck{} })
	got := make(chan *refused, 1)
	go func() {
		_, ref := dial1(w, billing, "slow.test:443")
		got <- ref
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for w.gw.Tunnels() == 0 {
		<-tick.C
	}
	w.use(w.policy("", ""))
	w.gw.Rejudge()
	if ref := <-got; ref == nil || ref.status != 403 {
		t.Errorf("got %+v", ref)
	}
	w.until("denial", denial(ReasonRevoked))
}

func TestDialTriesTheNextAddress(t *testing.T) {
	w := newWorld(t, nil)
	grant, err := w.judge.Judge(&authz.Call{Dir: mesh.Out, Src: billing, Dst: "host:db.test", Port: 5432, Verb: "CONNECT", Path: "-"})
	if err != nil {
		t.Fatal(err)
	}
	host, _ := ParseHost("db.test")
	how := mesh.Destination{Host: "db.test", Private: prefixes("127.0.0.1/32"), Endpoints: []mesh.Outlet{{Address: "10.0.0.1:1"}, {Address: "127.0.0.1:1"}, {Address: w.db.addr}}}
	c, _, note, err := w.gw.dialer.Dial(t.Context(), grant, Target{Host: host, Port: 5432, How: how})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.RemoteAddr().String() != w.db.addr || !strings.Contains(note, "10.0.0.1") {
		t.Errorf("dialled %s, %s", c.RemoteAddr(), note)
	}
}

func TestInTurn(t *testing.T) {
	var addrs []netip.Addr
	for _, a := range []string{"2606::1", "2606::2", "2606::3", "1.1.1.1", "::ffff:1.1.1.2"} {
		addrs = append(addrs, netip.MustParseAddr(a))
	}
	var got []string
	for _, ap := range inTurn(addrs, 443) {
		got = append(got, ap.Addr().String())
	}
	if want := "2606::1 1.1.1.1 2606::2 ::ffff:1.1.1.2 2606::3"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestRulesOfTimeEndTunnels(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.Rejudge = 10 * time.Millisecond })
	until := time.Now().Add(8 * time.Second).UTC().Format(time.RFC3339)
	w.use(w.policy("p, brief, out, spiffe://demo.sallyport/ns/shop/sa/billing, host:db.test, *, CONNECT, -, until="+until+", allow\n", ""))
	tun, ref := dial1(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused before %s: %+v", until, ref)
	}
	defer tun.Close()
	if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != "revoked" {
		t.Errorf("recorded %+v", end)
	}
}
