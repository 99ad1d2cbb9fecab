package control

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// dialTimeout bounds the connection to one address, handshake included.
const dialTimeout = 5 * time.Second

// alertText begins what crypto/tls says of an alert that the peer sent.
const alertText = "remote error: tls:"

// A link is a connection under one agent SVID, or under none. It is replaced
// when the SVID is and when it fails, so that each call makes at most one round
// over the addresses and the caller decides when to try again.
type link struct {
	cc *grpc.ClientConn
	// leaf is the agent SVID, DER; nil when there was none.
	leaf []byte
	// refs counts calls and streams; the Client's mu guards it.
	refs int
	// stale is closed when a newer link takes its place.
	stale chan struct{}

	// mu guards fault: why the last attempt to connect failed.
	mu    sync.Mutex
	fault error
}

func (l *link) setFault(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fault = err
}

func (l *link) lastFault() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fault
}

// acquire returns the link under the present identity; release must follow.
func (c *Client) acquire() (*link, error) {
	cert, err := c.cfg.Identity()
	if err != nil {
		return nil, fmt.Errorf("read agent SVID: %w", err)
	}
	if cert != nil {
		leaf, err := leafOf(cert)
		if err != nil {
			return nil, err
		}
		if now := c.cfg.Now(); now.After(leaf.NotAfter) {
			return nil, fmt.Errorf("%w: its SVID expired at %s; %s", ErrMustReattest, stamp(leaf.NotAfter), nextToken)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.New("client is closed")
	}
	if c.link == nil || !bytes.Equal(c.link.leaf, leafDER(cert)) {
		l, err := c.open(cert)
		if err != nil {
			return nil, err
		}
		c.supersede(l)
	}
	c.link.refs++
	return c.link, nil
}

// supersede puts l in the place of the current link. c.mu is held.
func (c *Client) supersede(l *link) {
	old := c.link
	c.link = l
	if old == nil {
		return
	}
	close(old.stale)
	if old.refs == 0 {
		old.cc.Close()
	}
}

func (c *Client) release(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.refs--; l.refs == 0 && l != c.link {
		l.cc.Close()
	}
}

// discard drops a link that cannot connect, so that the next call starts afresh
// and does not wait for the connection's own pace. A call may fail a moment
// before the connection calls itself failed, so anything but ready counts.
func (c *Client) discard(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == l && l.cc.GetState() != connectivity.Ready {
		c.supersede(nil)
	}
}

// moved reports whether the agent's SVID is another than that of l.
func (c *Client) moved(l *link) bool {
	cert, err := c.cfg.Identity()
	return err == nil && cert != nil && !bytes.Equal(l.leaf, leafDER(cert))
}

func leafDER(cert *tls.Certificate) []byte {
	if cert == nil || len(cert.Certificate) == 0 {
		return nil
	}
	return cert.Certificate[0]
}

// open prepares a link; nothing is dialled before its first call.
func (c *Client) open(cert *tls.Certificate) (*link, error) {
	l := &link{leaf: leafDER(cert), stale: make(chan struct{})}
	r := manual.NewBuilderWithScheme("issuer")
	var addrs []resolver.Address
	for _, a := range c.cfg.Addresses {
		addrs = append(addrs, resolver.Address{Addr: a})
	}
	r.InitialState(resolver.State{Addresses: addrs})
	dial := net.Dialer{Timeout: dialTimeout}
	cc, err := grpc.NewClient("issuer:///"+c.cfg.TrustDomain.Name(),
		grpc.WithResolvers(r),
		grpc.WithTransportCredentials(tellingCreds{credentials.NewTLS(c.tlsConfig(l, cert))}),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := dial.DialContext(ctx, "tcp", addr)
			if err != nil {
				l.setFault(err)
			}
			return conn, err
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryMax, Multiplier: 1, MaxDelay: retryMax},
			MinConnectTimeout: dialTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveAfter, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithReadBufferSize(4096), grpc.WithWriteBufferSize(4096),
		grpc.WithStaticStreamWindowSize(streamWindow), grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("prepare connection to %s: %w", strings.Join(c.cfg.Addresses, ", "), err)
	}
	l.cc = cc
	return l, nil
}

// tlsConfig trusts exactly the issuer of the trust domain. It looks at the
// bundle at each handshake, so a new root counts at once.
func (c *Client) tlsConfig(l *link, cert *tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		// The name in the certificate is a SPIFFE ID: VerifyConnection checks it.
		InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if cert == nil {
				return &tls.Certificate{}, nil
			}
			return cert, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if c.unproved {
				return nil
			}
			err := c.verifyIssuer(cs)
			l.setFault(err)
			return err
		},
	}
}

// verifyIssuer explains why who answered is not the issuer.
func (c *Client) verifyIssuer(cs tls.ConnectionState) error {
	now, want := c.cfg.Now(), ServerID(c.cfg.TrustDomain)
	id, err := verifyPeer(cs.PeerCertificates, c.cfg.Bundle(), c.cfg.TrustDomain, now)
	switch {
	case err == nil && id == want:
		return nil
	case err == nil:
		return fmt.Errorf("%w: it proves to be %s, want %s; check the issuer's address", ErrUntrusted, id, want)
	case errors.Is(err, errOutsideValidity):
		from, to := validity(cs.PeerCertificates)
		return fmt.Errorf("%w: this machine's clock (%s) is outside the issuer certificate's validity (%s to %s); set the clock", ErrClock, stamp(now), stamp(from), stamp(to))
	case errors.Is(err, ErrTrustDomain):
		return fmt.Errorf("%w: the issuer serves %s, this process belongs to %s; correct trust_domain or the issuer's address", ErrTrustDomain, id.TrustDomain(), c.cfg.TrustDomain)
	}
	return fmt.Errorf("%w: %w; check the issuer's address, and fetch the bundle file anew", ErrUntrusted, err)
}

// tellingCreds makes connections whose errors tell why the issuer hung up.
type tellingCreds struct {
	credentials.TransportCredentials
}

func (t tellingCreds) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return &tellingConn{Conn: conn}, info, nil
}

func (t tellingCreds) Clone() credentials.TransportCredentials {
	return tellingCreds{t.TransportCredentials.Clone()}
}

// A tellingConn looks for the issuer's alert when a write fails. In TLS 1.3 the
// issuer judges the client certificate after the client has begun to write, so
// the first sign of a refusal may be a broken pipe.
type tellingConn struct{ net.Conn }

func (t *tellingConn) Write(p []byte) (int, error) {
	n, err := t.Conn.Write(p)
	if err == nil {
		return n, nil
	}
	// The connection is lost: what is read is of no other use.
	if t.Conn.SetReadDeadline(time.Now().Add(time.Second)) == nil {
		if _, why := t.Conn.Read(make([]byte, 1)); why != nil && strings.Contains(why.Error(), alertText) {
			return n, why
		}
	}
	return n, err
}
