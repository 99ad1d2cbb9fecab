package egress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
)

const (
	// maxIdleOrigin is how many connections are kept to one host, and maxIdleAll
	// to all.
	maxIdleOrigin = 64
	maxIdleAll    = 4096
	// originIdle is how long a connection is kept unused. Servers close theirs
	// after a minute or more, by custom.
	originIdle = 50 * time.Second
	// originAge is how old one may be that is used again: what the host is at, and
	// what its certificate says, is looked at anew by then.
	originAge = 5 * time.Minute
	// originShake bounds a handshake with a host.
	originShake = 10 * time.Second
)

// An originKey is whom a connection leads to, and as whom.
type originKey struct {
	// who has asked on it: some hosts take a connection, once it has proved who it
	// is (NTLM, Negotiate), for that caller's.
	who     spiffeid.ID
	host    Host
	port    uint16
	tls, ca string
	// at are the endpoints of the destination, or the one that it leads to where each
	// counts for itself; empty when DNS says where.
	at     string
	secret string // the name of what is injected
	alpn   string // what may be spoken
}

// originKeyOf is whom the connection of a request leads to.
func originKeyOf(f *fetch) originKey {
	var at []byte
	for _, e := range f.how.Endpoints {
		at = append(append(at, e.Address...), ' ')
	}
	return originKey{who: f.call.Src, host: f.host, port: f.call.Port, tls: f.how.TLS, ca: f.how.CA, at: string(at), secret: f.secret, alpn: strings.Join(f.how.ALPN, " ")}
}

// An origin is a connection to a host on which the gateway speaks HTTP itself.
type origin struct {
	*http1.Conn
	nc     net.Conn
	tcp    link     // under TLS
	line   *line    // that it is a stream of; nil for a connection of its own
	meter  *metered // between them, where it may become a WebSocket
	key    originKey
	to     place
	reused bool
	born   time.Time
	idle   time.Time
}

// metered has what goes over o count for f once it is a WebSocket.
func (o *origin) metered(f *fetch) {
	o.Release()
	o.meter = &metered{Conn: o.nc, f: f}
	o.Conn = http1.NewConn(o.meter, http1.Limits{})
}

// cut breaks o off. An orderly end could have the host end its answer in order.
func (o *origin) cut() {
	if o.line != nil {
		o.nc.Close() // which is the stream
		return
	}
	_ = o.tcp.SetLinger(0)
	o.tcp.Close()
}

func (o *origin) discard() {
	o.nc.Close()
	o.Release()
}

// origins keeps connections to hosts between requests. It is safe for concurrent
// use.
type origins struct {
	mu     sync.Mutex // guards what follows
	idle   map[originKey][]*origin
	n      int
	closed bool
	lines  map[originKey][]*line
	bodies *mux.Budget // of lines

	running sync.WaitGroup // lines
}

// take gives the connection that came back last, if one fits. It takes the proof
// that the request was allowed, as a dial does.
func (p *origins) take(proof authz.Grant, key originKey, fits func(place) bool) *origin {
	if !proof.Covers("host:"+key.host.String(), key.port) {
		return nil
	}
	for {
		p.mu.Lock()
		list := p.idle[key]
		if len(list) == 0 {
			p.mu.Unlock()
			return p.stream(key, fits)
		}
		o := list[len(list)-1]
		p.keep(key, list[:len(list)-1])
		p.n--
		p.mu.Unlock()
		if time.Since(o.idle) < originIdle && time.Since(o.born) < originAge && !o.Stale() && fits(o.to) {
			o.reused = true
			return o
		}
		o.discard()
	}
}

// keep sets what is kept of a host. The caller holds the lock.
func (p *origins) keep(key originKey, list []*origin) {
	if len(list) == 0 {
		delete(p.idle, key)
		return
	}
	p.idle[key] = list
}

// put takes a connection back that may carry another request.
func (p *origins) put(o *origin) {
	if o.line != nil {
		o.discard() // another is opened as fast
		return
	}
	o.Rest()
	o.idle = time.Now()
	p.mu.Lock()
	full := p.closed || time.Since(o.born) >= originAge || p.n >= maxIdleAll || len(p.idle[o.key]) >= maxIdleOrigin
	if !full {
		if p.idle == nil {
			p.idle = make(map[originKey][]*origin)
		}
		p.idle[o.key] = append(p.idle[o.key], o)
		p.n++
	}
	p.mu.Unlock()
	if full {
		o.discard()
	}
}

// sweep closes what was kept for too long; with all, everything for good.
func (p *origins) sweep(all bool) {
	var old []*origin
	p.mu.Lock()
	p.closed = p.closed || all
	for key, list := range p.idle {
		n := 0
		for n < len(list) && (all || time.Since(list[n].idle) >= originIdle) {
			n++
		}
		old = append(old, list[:n]...)
		p.keep(key, append([]*origin(nil), list[n:]...))
	}
	p.n -= len(old)
	if all {
		p.closeLines()
	}
	p.mu.Unlock()
	for _, o := range old {
		o.discard()
	}
	if all {
		p.running.Wait()
	}
}

// shake has a host prove its name where TLS is spoken.
func (g *Gateway) shake(ctx context.Context, conn link, at place, key originKey, to *Target) (*origin, error) {
	o := &origin{nc: conn, tcp: conn, key: key, born: time.Now(), to: at}
	if to.How.TLS != "" {
		cfg, err := g.originTLS(to)
		if err != nil {
			conn.Close()
			return nil, err
		}
		tc := tls.Client(conn, cfg)
		ctx, cancel := context.WithTimeout(ctx, originShake)
		defer cancel()
		if err := tc.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, refuseShake(to.Host, err)
		}
		o.nc = tc
		switch spoken := tc.ConnectionState().NegotiatedProtocol; {
		case spoken == mesh.ALPNHTTP2:
			return g.origins.share(o)
		case len(cfg.NextProtos) > 0 && !slices.Contains(cfg.NextProtos, mesh.ALPNHTTP1):
			conn.Close()
			return nil, refuse(ReasonDial, "%s speaks none of %s", to.Host, strings.Join(cfg.NextProtos, ", "))
		}
	}
	o.Conn = http1.NewConn(o.nc, http1.Limits{})
	return o, nil
}

// originTLS is the client's side of TLS to a host: its certificate must be for
// the name that was judged, whatever address it is at.
func (g *Gateway) originTLS(to *Target) (*tls.Config, error) {
	cfg := &tls.Config{ServerName: to.Host.String(), MinVersion: tls.VersionTLS12, NextProtos: protocolsOf(&to.How)}
	roots, err := rootsOf(to.How.CA, g.cfg.Roots)
	if err != nil {
		return nil, refuse(ReasonNoPolicy, "the destination of %s: ca: %v", to.Host, err)
	}
	cfg.RootCAs = roots
	return cfg, nil
}

// rootsOf are the authorities that a policy names, or else those that are usual.
func rootsOf(ca string, usual *x509.CertPool) (*x509.CertPool, error) {
	if ca == "" {
		return usual, nil
	}
	list, err := mesh.ParseCA(ca)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	for _, c := range list {
		roots.AddCert(c)
	}
	return roots, nil
}

// refuseShake says why a host is not spoken to.
func refuseShake(h Host, err error) *Refusal {
	var cert *tls.CertificateVerificationError
	var ne net.Error
	switch {
	case errors.As(err, &cert):
		return refuse(ReasonCertificate, "%s did not prove its name: %s", h, clip(cert.Err.Error()))
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &ne) && ne.Timeout():
		return refuse(ReasonTimeout, "handshake with %s: %v", h, err)
	}
	return refuse(ReasonDial, "handshake with %s: %v", h, err)
}
