package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"sallyport/internal/mesh"
)

// A stranger is refused by the headers of a call: what it sends is never held
// in memory, so a message that never ends costs nothing.
func TestAStrangersMessagesAreNotRead(t *testing.T) {
	r := newRig(t, newCA(t, td))
	l, err := r.client(&holder{}).acquire()
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{svidv1.SVID_BatchNewX509SVID_FullMethodName, agentv1.Agent_RenewAgent_FullMethodName} {
		st, err := l.cc.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(&bundlev1.GetBundleRequest{}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s without a message: %v, want PermissionDenied at once", method, err)
		}
	}
}

func TestSilentStrangersDoNotHoldUpOthers(t *testing.T) {
	r := newRig(t, newCA(t, td))
	member, _ := r.joined("node-a")
	l, err := r.client(&holder{}).acquire()
	if err != nil {
		t.Fatal(err)
	}
	for range strangerCalls {
		if _, err := agentv1.NewAgentClient(l.cc).AttestAgent(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	late, err := agentv1.NewAgentClient(l.cc).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := late.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one silent call too many: %v, want ResourceExhausted", err)
	}
	if _, err := member.SyncEntries(t.Context()); err != nil {
		t.Errorf("an agent beside silent strangers: %v", err)
	}
	if n := len(r.srv.attests); n != 0 {
		t.Errorf("silent strangers hold %d places of those who are judged", n)
	}
	s := r.srv
	from := func(ip string) context.Context {
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		return peer.NewContext(ctx, &peer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP(ip), Port: 1}, AuthInfo: credentials.TLSInfo{}})
	}
	attest := &tap.Info{FullMethodName: agentv1.Agent_AttestAgent_FullMethodName}
	for range strangerCalls {
		if _, err := s.tap(from("192.0.2.1"), attest); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.tap(from("192.0.2.1"), attest); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one call too many of one address: %v, want ResourceExhausted", err)
	}
	if _, err := s.tap(from("192.0.2.2"), attest); err != nil {
		t.Errorf("a call from another address: %v", err)
	}
	if a, b := addressOf(from("2001:db8::1")), addressOf(from("2001:db8::2")); a != b || a == "" {
		t.Errorf("neighbours in one /64 are %q and %q", a, b)
	}
	if a, b := addressOf(from("::ffff:192.0.2.1")), addressOf(from("192.0.2.1")); a != b {
		t.Errorf("one IPv4 address is %q and %q", a, b)
	}
}

func TestRefusedAttestationsOfAnAddressAreBounded(t *testing.T) {
	var records atomic.Int32
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.OnAttest = func(context.Context, Attestation) error { records.Add(1); return nil }
	})
	r.srv.refusals.burst, r.srv.refusals.rate = 3, 0.001
	c := r.client(&holder{})
	for i := range 6 {
		_, err := c.Attest(t.Context(), "join_token", []byte("used"), newKey(t))
		if want := errors.Is(err, ErrTokenUsed); want != (i < 3) {
			t.Errorf("attempt %d: %v", i, err)
		}
	}
	if n := records.Load(); n != 3 {
		t.Errorf("%d records, want 3", n)
	}
}

func TestAnAgentsWorkIsBounded(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-a")
	r.srv.work.burst, r.srv.work.rate = 10, 0.001
	req := SVIDRequest{EntryID: "e-pay", ID: payment, Key: newKey(t)}
	if _, err := c.NewX509SVIDs(t.Context(), []SVIDRequest{req, req, req, req, req, req, req, req, req, req, req, req}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.NewX509SVIDs(t.Context(), []SVIDRequest{req}); !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "try again in") {
		t.Errorf("beyond the budget: %v, want ErrFailed", err)
	}
	other, _ := r.joined("node-b")
	if _, err := other.SyncEntries(t.Context()); err != nil {
		t.Errorf("another agent: %v", err)
	}
}

func TestABudgetFillsAgain(t *testing.T) {
	b := budgets{rate: 2, burst: 10}
	now := time.Unix(1e9, 0)
	if _, ok := b.take("a", 14, now); !ok {
		t.Error("a full budget gave nothing")
	}
	wait, ok := b.take("a", 1, now)
	if ok || wait != 2500*time.Millisecond {
		t.Errorf("overdrawn by 4: %v, wait %s; want 2.5s", ok, wait)
	}
	if _, ok := b.take("a", 1, now.Add(-time.Hour)); ok {
		t.Error("a clock that stepped back fills the budget")
	}
	if _, ok := b.take("a", 1, now.Add(wait)); !ok {
		t.Error("not filled after the wait it named")
	}
	for i := range 2 * maxBudgets {
		b.take(fmt.Sprint(i), 1, now.Add(time.Duration(i)*time.Second))
	}
	if len(b.left) > maxBudgets {
		t.Errorf("%d budgets are kept", len(b.left))
	}
}

func TestConnectionsOfStrangersAreBounded(t *testing.T) {
	var conns tally
	d := &doorCreds{credentials.NewTLS(nil), &conns, 1}
	a, b := net.Pipe()
	b.Close()
	for range 2 {
		if _, _, err := d.ServerHandshake(a); err == nil || strings.Contains(err.Error(), "too many") {
			t.Errorf("a failed handshake: %v", err)
		}
	}
	if conns.all != 0 || len(conns.here) != 0 {
		t.Errorf("%d connections are counted after all have failed", conns.all)
	}
	conns.enter("", 1, 1)
	if _, _, err := d.ServerHandshake(a); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("one connection too many: %v", err)
	}
}

func TestAnEdgeIsFitForATerminal(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-a")
	for _, dst := range []string{"\x1b[2J", "a b", "host:x\n", "h\u202e"} {
		err := c.ReportEdges(t.Context(), []mesh.Edge{{Src: payment.String(), Dst: dst, Proto: "http", Allowed: 1}})
		if !errors.Is(err, ErrRefused) {
			t.Errorf("edge to %q: %v, want ErrRefused", dst, err)
		}
	}
}

func TestALongChainIsNotLookedAt(t *testing.T) {
	a := newCA(t, td)
	cert := a.issue(t, agentID("node-a"), newKey(t))
	chain := []*x509.Certificate{cert.Leaf}
	for range maxChain {
		chain = append(chain, a.mid)
	}
	if _, err := verifyPeer(chain, a.X509Bundle(), td, time.Now()); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("chain of %d: %v", len(chain), err)
	}
	if _, err := verifyPeer(chain[:2], a.X509Bundle(), td, time.Now()); err != nil {
		t.Error(err)
	}
}
