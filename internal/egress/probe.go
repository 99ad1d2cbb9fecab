package egress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// probeLife is for how long a certificate counts that was seen, unless it ends
	// before; probeAgain after what time one that was not is looked at again.
	probeLife  = time.Hour
	probeAgain = 10 * time.Second
	// maxProbes bounds how many are remembered, maxProbesOf those of them that one
	// caller has begun.
	maxProbes, maxProbesOf = 4096, 512
	// maxProbing bounds how many are under way, maxProbingOf those of one caller,
	// and fewProbing while there are half as many as there may be: a handful of
	// callers must not keep all others out.
	maxProbing, maxProbingOf, fewProbing = 512, 64, 8
)

// probes are what the gateway has seen for itself of the certificates of hosts
// whose TLS it passes through. One handshake serves all tunnels to an address of
// a host until it is old. It is safe for concurrent use.
type probes struct {
	mu    sync.Mutex // guards what follows
	going map[probeKey]*probe
	known map[probeKey]*probe
	of    map[spiffeid.ID]*probesOf
	n     int // under way, with those that nobody waits for any more
}

// probesOf are those that a caller has begun: how many are under way, and those
// that are known, the oldest first.
type probesOf struct {
	going int
	known []*probe
}

// A probeKey is who must have a certificate, where, from whom, and for which
// protocols.
type probeKey struct {
	host Host
	at   place
	ca   string
	alpn string
}

type probe struct {
	key     probeKey
	who     spiffeid.ID        // who has begun it
	ctx     context.Context    // ends with the last who waits
	cancel  context.CancelFunc // ends that
	waiting int                // guarded by probes.mu

	done chan struct{} // closed when what follows is known
	note string        // of the certificate
	err  error
	over time.Time // when it is to be looked at again
}

// ask gives what is known of k, or is about to be: whoever asks waits for it until
// he leaves. With begin it is a new probe, which he must make, and end. The error
// is a *Refusal when too many are under way.
func (p *probes) ask(base context.Context, k probeKey, who spiffeid.ID) (pr *probe, begin bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pr = p.known[k]; pr != nil && !time.Now().Before(pr.over) {
		p.forget(pr)
		pr = nil
	}
	if pr == nil {
		pr = p.going[k]
	}
	if pr != nil {
		pr.waiting++
		return pr, false, nil
	}
	mine, may := p.of[who], maxProbingOf
	if p.n >= maxProbing/2 {
		may = fewProbing
	}
	switch {
	case p.n >= maxProbing:
		return nil, false, refuse(ReasonProbeCap, "the certificates of %d hosts are being looked at, which is the limit", maxProbing)
	case mine == nil:
		mine = new(probesOf)
	case mine.going >= may:
		return nil, false, refuse(ReasonProbeCap, "the certificates of %d hosts are being looked at for %s, which is as many as one caller may have now: the limit is %d", mine.going, who, may)
	}
	if p.of == nil {
		p.going, p.known, p.of = make(map[probeKey]*probe), make(map[probeKey]*probe), make(map[spiffeid.ID]*probesOf)
	}
	pr = &probe{key: k, who: who, waiting: 1, done: make(chan struct{})}
	pr.ctx, pr.cancel = context.WithTimeout(base, originShake)
	mine.going++
	p.n++
	p.going[k], p.of[who] = pr, mine
	return pr, true, nil
}

// leave is for who has waited. A probe that nobody waits for any more is broken
// off, and says nothing of the host.
func (p *probes) leave(pr *probe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pr.waiting--; pr.waiting > 0 {
		return
	}
	pr.cancel()
	if p.going[pr.key] == pr {
		delete(p.going, pr.key)
	}
}

// end is for who has made a probe: it is known from now on.
func (p *probes) end(pr *probe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pr.cancel()
	close(pr.done)
	p.n--
	p.of[pr.who].going--
	if p.going[pr.key] == pr {
		delete(p.going, pr.key)
		p.keep(pr)
	}
	p.settle(pr.who)
}

// keep remembers a probe. It drives out the oldest of whoever has too many, or has
// most when all have. The lock is held.
func (p *probes) keep(pr *probe) {
	mine := p.of[pr.who]
	full := mine
	if len(full.known) < maxProbesOf && len(p.known) >= maxProbes {
		for _, o := range p.of {
			if len(o.known) > len(full.known) {
				full = o
			}
		}
	}
	if len(full.known) >= maxProbesOf || len(p.known) >= maxProbes {
		old := full.known[0]
		full.known = full.known[1:]
		delete(p.known, old.key)
		p.settle(old.who)
	}
	mine.known = append(mine.known, pr)
	p.known[pr.key], p.of[pr.who] = pr, mine
}

// forget drops one that is old. The lock is held.
func (p *probes) forget(pr *probe) {
	mine := p.of[pr.who]
	mine.known = slices.DeleteFunc(mine.known, func(x *probe) bool { return x == pr })
	delete(p.known, pr.key)
	p.settle(pr.who)
}

// settle drops what is held of a caller who has none. The lock is held.
func (p *probes) settle(who spiffeid.ID) {
	if o := p.of[who]; o.going == 0 && len(o.known) == 0 {
		delete(p.of, who)
	}
}

// probe sees that the host of t has a certificate for its name at the address that
// t leads to, and says which. It makes a handshake of its own there, since in TLS
// 1.3 nobody between sees the one in the tunnel.
func (g *Gateway) probe(ctx context.Context, t *tunnel, at place) (note string, err error) {
	pr, begin, err := g.probes.ask(g.base, probeKey{t.host, at, t.how.CA, strings.Join(t.how.ALPN, " ")}, t.call.Src)
	if err != nil {
		return "", err
	}
	defer g.probes.leave(pr)
	if begin {
		to := Target{Host: t.host, Port: t.call.Port, How: t.how}
		g.wg.Go(func() {
			defer g.probes.end(pr)
			defer g.recovered()
			pr.err, pr.over = refuse(ReasonInternal, "the probe of %s failed", to.Host), time.Now().Add(probeAgain)
			var leaf *x509.Certificate
			if leaf, pr.err = g.prove(pr.ctx, to, at); pr.err != nil {
				pr.over = time.Now().Add(probeAgain)
				return
			}
			pr.note = fmt.Sprintf("certificate of %s by %s", clip(leaf.Subject.CommonName), clip(leaf.Issuer.CommonName))
			if pr.over = time.Now().Add(probeLife); leaf.NotAfter.Before(pr.over) {
				pr.over = leaf.NotAfter
			}
		})
	}
	select {
	case <-pr.done:
		return pr.note, pr.err
	case <-ctx.Done():
		return "", refuse(ReasonTimeout, "the certificate of %s was not seen in time", t.host)
	}
}

// prove has a host prove its name at an address, and gives the certificate.
func (g *Gateway) prove(ctx context.Context, to Target, at place) (*x509.Certificate, error) {
	conn, _, err := g.dialer.reach(ctx, at, &to)
	if err != nil {
		return nil, dialError(ctx, []error{err})
	}
	defer conn.Close()
	cfg, err := g.originTLS(&to)
	if err != nil {
		return nil, err
	}
	tc := tls.Client(conn, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, refuseShake(to.Host, err)
	}
	return tc.ConnectionState().PeerCertificates[0], nil
}
