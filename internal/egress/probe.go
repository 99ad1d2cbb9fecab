package egress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"
)

const (
	// probeLife is for how long a certificate counts that was seen, unless it ends
	// before; probeAgain after what time one that was not is looked at again.
	probeLife  = time.Hour
	probeAgain = 10 * time.Second
	// maxProbes bounds how many are remembered.
	maxProbes = 4096
)

// probes are what the gateway has seen for itself of the certificates of hosts
// whose TLS it passes through. One handshake serves all tunnels to an address of
// a host until it is old. It is safe for concurrent use.
type probes struct {
	mu sync.Mutex // guards of
	of map[probeKey]*probe
}

// A probeKey is who must have a certificate, where, and from whom.
type probeKey struct {
	host Host
	at   place
	ca   string
}

type probe struct {
	done chan struct{} // closed when what follows is known
	note string        // of the certificate
	err  error
	over time.Time // when it is to be looked at again
}

// fresh gives what is known of k, or is about to be; else a new probe that the
// caller must make.
func (p *probes) fresh(k probeKey, now time.Time) (pr *probe, found bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pr = p.of[k]; pr != nil && !pr.old(now) {
		return pr, true
	}
	if len(p.of) >= maxProbes {
		for k, pr := range p.of {
			if pr.old(now) {
				delete(p.of, k)
			}
		}
	}
	if len(p.of) >= maxProbes {
		clear(p.of) // those under way are waited for by who has them
	}
	if p.of == nil {
		p.of = make(map[probeKey]*probe)
	}
	pr = &probe{done: make(chan struct{})}
	p.of[k] = pr
	return pr, false
}

func (pr *probe) old(now time.Time) bool {
	select {
	case <-pr.done:
		return !now.Before(pr.over)
	default:
		return false
	}
}

// probe sees that the host of t has a certificate for its name at the address that
// t leads to, and says which. It makes a handshake of its own there, since in TLS
// 1.3 nobody between sees the one in the tunnel.
func (g *Gateway) probe(ctx context.Context, t *tunnel, at place) (note string, err error) {
	k := probeKey{t.host, at, t.how.CA}
	pr, found := g.probes.fresh(k, time.Now())
	if !found {
		to := Target{Host: t.host, Port: t.call.Port, How: t.how}
		g.wg.Go(func() {
			defer close(pr.done)
			defer g.recovered()
			pr.err, pr.over = refuse(ReasonInternal, "the probe of %s failed", t.host), time.Now().Add(probeAgain)
			var leaf *x509.Certificate
			if leaf, pr.err = g.prove(to, at); pr.err != nil {
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
func (g *Gateway) prove(to Target, at place) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(g.base, originShake)
	defer cancel()
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
