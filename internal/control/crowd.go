package control

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"sallyport/internal/control/meshpb"
)

// What one party may have of the issuer. A stranger is whoever shows no agent
// SVID, known by address; an agent, by its SVID. The bounds are far above what
// an honest proxy asks for and keep one party from taking what all need:
// memory, the CPU that signs, and the disk.
const (
	// strangerConns bounds the connections of one address that show no
	// certificate, those in a handshake included; a fleet may stand behind one
	// address.
	strangerConns = 1024
	// strangerCalls bounds the calls of one address in flight, allStrangers
	// those of all. A call may hold maxRequest bytes.
	strangerCalls = 16
	allStrangers  = 512
	// agentCalls bounds the calls of one agent in flight, streams included.
	agentCalls = 64
	// agentLooks bounds the looks that the proxies of one agent answer at once,
	// which leave the streams to what policy needs.
	agentLooks = 8

	// refusalRate and refusalBurst bound the refused attestations of one
	// address, each of which is recorded: per second, and at once.
	refusalRate, refusalBurst = 1, 100
	// workRate and workBurst bound the calls and signatures of one agent.
	workRate, workBurst = 100, 4000
	// uploadRate and uploadBurst bound the audit lines of one agent, bytes.
	uploadRate, uploadBurst = 8 << 20, 64 << 20
	// answerGap is the least time between two messages of a subscriber.
	answerGap = 5 * time.Millisecond
)

// workOf is what a call costs its agent, beside one for each signature. What
// is not named costs 1.
var workOf = map[string]float64{
	meshpb.Mesh_Subscribe_FullMethodName:    20, // may announce endpoints to all
	meshpb.Mesh_UploadAudit_FullMethodName:  20,
	meshpb.Mesh_ReportEdges_FullMethodName:  10,
	meshpb.Mesh_Cosign_FullMethodName:       10, // writes durably
	agentv1.Agent_RenewAgent_FullMethodName: 10, // writes durably
}

// operatorWork is what a call costs an operator from afar, whose every call is
// recorded: what has others write as well is held to a rate.
var operatorWork = map[string]float64{
	meshpb.Admin_Tap_FullMethodName: 200, // has two logs written: 20 at once, one in two seconds
}

// A tally counts who is here.
type tally struct {
	mu   sync.Mutex
	here map[string]int
	all  int
}

// enter counts one more of who, if it and all may have one more.
func (t *tally) enter(who string, each, all int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.here[who] >= each || t.all >= all {
		return false
	}
	if t.here == nil {
		t.here = map[string]int{}
	}
	t.here[who]++
	t.all++
	return true
}

func (t *tally) leave(who string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all--
	if t.here[who]--; t.here[who] <= 0 {
		delete(t.here, who)
	}
}

// budgets give each party a rate and what it may spend at once.
type budgets struct {
	rate, burst float64

	mu   sync.Mutex
	left map[string]budget
}

type budget struct {
	left float64
	at   time.Time
}

// maxBudgets bounds the memory: full budgets are forgotten beyond it.
const maxBudgets = 1 << 14

// take spends n of who's budget and reports whether there was anything left: a
// party may overdraw once. If not, wait says when there will be. n may be 0.
func (b *budgets) take(who string, n float64, now time.Time) (wait time.Duration, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left == nil {
		b.left = map[string]budget{}
	}
	if len(b.left) >= maxBudgets {
		for k, v := range b.left {
			if b.filled(v, now) >= b.burst {
				delete(b.left, k)
			}
		}
	}
	old, known := b.left[who]
	left := b.burst
	if known {
		left = b.filled(old, now)
	}
	if left < 1 {
		return time.Duration((1 - left) / b.rate * float64(time.Second)), false
	}
	if n > 0 {
		b.left[who] = budget{left - n, now}
	}
	return 0, true
}

// filled is what a budget has by now. A clock that stepped back takes nothing.
func (b *budgets) filled(v budget, now time.Time) float64 {
	return min(b.burst, v.left+max(0, now.Sub(v.at).Seconds())*b.rate)
}

// spend charges an agent or an operator for work.
func (s *Server) spend(id spiffeid.ID, n float64) error {
	if wait, ok := s.work.take(id.String(), n, s.cfg.Now()); !ok {
		return refuse(codes.ResourceExhausted, "%s asks for too much at once: try again in %s", id, wait.Round(time.Second)+time.Second)
	}
	return nil
}

// tap looks at each call before any of its message is read: a stranger's
// messages are never held in memory but for the calls that strangers may make.
// The call is counted until it ends.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	c, err := s.authenticate(ctx)
	switch {
	case err == nil:
		who := c.id.String()
		if !s.agentCalls.enter(who, agentCalls+s.cfg.StreamsPerAgent+agentLooks, 1<<30) {
			return nil, refuse(codes.ResourceExhausted, "agent %s has %d calls open: wait for one to end", c.id, agentCalls)
		}
		context.AfterFunc(ctx, func() { s.agentCalls.leave(who) })
	case rights[info.FullMethodName]&toAnyone == 0:
		return nil, err
	default:
		who := addressOf(ctx)
		if !s.strangers.enter(who, strangerCalls, allStrangers) {
			return nil, refuse(codes.ResourceExhausted, "too many calls without an agent SVID at once: try again later")
		}
		context.AfterFunc(ctx, func() { s.strangers.leave(who) })
	}
	return ctx, nil
}

// addressOf names a stranger: an IPv4 address, or the network of 64 bits that
// one holder of IPv6 addresses has.
func addressOf(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return network(p.Addr)
	}
	return ""
}

func network(a net.Addr) string {
	if a == nil {
		return ""
	}
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return ""
	}
	ip := ap.Addr().Unmap()
	if ip.Is4() {
		return ip.String()
	}
	p, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return ""
	}
	return p.String()
}

// doorCreds counts connections that show no certificate.
type doorCreds struct {
	credentials.TransportCredentials
	conns *tally
	each  int
}

func (d *doorCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	who := network(raw.RemoteAddr())
	if !d.conns.enter(who, d.each, 1<<30) {
		return nil, nil, errors.New("too many connections without an agent SVID from " + who)
	}
	leave := sync.OnceFunc(func() { d.conns.leave(who) })
	conn, info, err := d.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		leave()
		return nil, nil, err
	}
	if ti, ok := info.(credentials.TLSInfo); ok && len(ti.State.PeerCertificates) > 0 {
		leave()
		return conn, info, nil
	}
	return &doorConn{Conn: conn, leave: leave}, info, nil
}

func (d *doorCreds) Clone() credentials.TransportCredentials {
	return &doorCreds{d.TransportCredentials.Clone(), d.conns, d.each}
}

type doorConn struct {
	net.Conn
	leave func()
}

func (c *doorConn) Close() error {
	c.leave()
	return c.Conn.Close()
}
