package nameserver

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/svid"
)

// DoT is the ALPN of DNS over TLS.
const DoT = "dot"

// ServeTLS answers over TLS (RFC 7858) until ctx ends, and closes the listener.
// The configuration must demand a certificate; standing looks again, at each
// question, at what the peer has proved.
func (n *Names) ServeTLS(ctx context.Context, ln net.Listener, conf *tls.Config, standing func(tls.ConnectionState) error) error {
	return n.Serve(ctx, tls.NewListener(ln, conf), peer(standing))
}

func peer(standing func(tls.ConnectionState) error) func(net.Conn) Peer {
	return func(c net.Conn) Peer {
		return func(ctx context.Context) (spiffeid.ID, error) {
			tc, ok := c.(*tls.Conn)
			if !ok {
				return spiffeid.ID{}, errors.New("this is no connection of TLS")
			}
			if err := tc.HandshakeContext(ctx); err != nil {
				return spiffeid.ID{}, err
			}
			return proved(tc.ConnectionState(), standing)
		}
	}
}

func proved(cs tls.ConnectionState, standing func(tls.ConnectionState) error) (spiffeid.ID, error) {
	if err := standing(cs); err != nil {
		return spiffeid.ID{}, err
	}
	return svid.PeerID(cs)
}

const (
	// mediaType and path are those of DNS over HTTPS (RFC 8484).
	mediaType = "application/dns-message"
	path      = "/dns-query"
)

// ServeHTTPS answers over HTTPS until ctx ends, and closes the listener. The
// connections of ln are made by TLS of that configuration, which must demand a
// certificate.
func (n *Names) ServeHTTPS(ctx context.Context, ln net.Listener, conf *tls.Config, standing func(tls.ConnectionState) error) error {
	conf = conf.Clone()
	conf.NextProtos = []string{"h2", "http/1.1"}
	s := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { n.serveHTTP(w, r, standing) }), TLSConfig: conf,
		ReadTimeout: idleTime, WriteTimeout: idleTime, IdleTimeout: idleTime, ReadHeaderTimeout: handshakeTime, MaxHeaderBytes: 8 << 10,
		ErrorLog: log.New(io.Discard, "", 0), BaseContext: func(net.Listener) context.Context { return ctx },
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: slow, MaxReadFrameSize: 16 << 10},
	}
	done := make(chan error, 1)
	go func() { done <- s.ServeTLS(&bounded{Listener: ln, places: make(chan struct{}, maxConns)}, "", "") }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		err := s.Close() // an answer takes a moment, and is asked for again
		<-done
		return err
	}
}

// serveHTTP answers one request. Its status speaks of HTTP alone.
func (n *Names) serveHTTP(w http.ResponseWriter, r *http.Request, standing func(tls.ConnectionState) error) {
	who, err := proved(*r.TLS, standing)
	if err != nil {
		w.Header().Set("Connection", "close")
		http.Error(w, "the certificate does not hold any more", http.StatusForbidden)
		return
	}
	in, status := questionOf(r)
	if status != 0 {
		http.Error(w, "a question is sent by POST as "+mediaType+", or by GET as ?dns= in base64url, to "+path, status)
		return
	}
	a := n.answerer(who, 1)
	if addr, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		a.from = func() netip.AddrPort { return addr }
	}
	if !a.may() {
		w.Header().Set("Retry-After", "1")
		http.Error(w, "more questions than this workload may ask", http.StatusTooManyRequests)
		return
	}
	began := time.Now()
	out, res := a.answer(r.Context(), in, true)
	a.told(res, began)
	if res == Dropped {
		w.Header().Set("Connection", "close")
		http.Error(w, "another process answers; ask again", http.StatusServiceUnavailable)
		return
	}
	if len(out) == 0 {
		http.Error(w, "this is no question", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Cache-Control", fmt.Sprintf("max-age=%d", freshFor(out)))
	_, _ = w.Write(out) // whoever asked may be gone
}

// questionOf reads the question out of a request.
func questionOf(r *http.Request) (in []byte, status int) {
	switch {
	case r.URL.Path != path:
		return nil, http.StatusNotFound
	case r.Method == http.MethodGet:
		in, err := base64.RawURLEncoding.DecodeString(r.URL.Query().Get("dns"))
		if err != nil || len(in) > room || len(in) < headSize {
			return nil, http.StatusBadRequest
		}
		return in, 0
	case r.Method != http.MethodPost:
		return nil, http.StatusMethodNotAllowed
	case !strings.EqualFold(r.Header.Get("Content-Type"), mediaType):
		return nil, http.StatusUnsupportedMediaType
	}
	in, err := io.ReadAll(io.LimitReader(r.Body, room+1))
	if err != nil || len(in) < headSize {
		return nil, http.StatusBadRequest
	}
	if len(in) > room {
		return nil, http.StatusRequestEntityTooLarge
	}
	return in, 0
}

// freshFor is how long an answer may be kept (RFC 8484, section 5.1): the least
// time to live in it, none of what says nothing of the name.
func freshFor(out []byte) uint32 {
	var m dns.Msg
	if m.Unpack(out) != nil || len(m.Answer)+len(m.Ns) == 0 {
		return 0
	}
	least := uint32(virtualTTL * 10)
	for _, rr := range append(m.Answer, m.Ns...) {
		least = min(least, rr.Header().Ttl)
	}
	return least
}

// bounded is a listener with a bound on connections; one more is closed at once.
type bounded struct {
	net.Listener
	places chan struct{}
}

// Accept waits for a connection that there is room for.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case b.places <- struct{}{}:
			return &placed{Conn: c, leave: b.places}, nil
		default:
			c.Close()
		}
	}
}

// placed gives its place up when it is closed.
type placed struct {
	net.Conn
	once  sync.Once
	leave <-chan struct{}
}

// Close closes the connection.
func (p *placed) Close() error {
	p.once.Do(func() { <-p.leave })
	return p.Conn.Close()
}
