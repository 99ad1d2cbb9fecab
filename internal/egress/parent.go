package egress

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/record"
	"sallyport/internal/upstream"
)

// errParent says that it was a proxy that made no connection: that is nothing to
// hold against the host.
var errParent = errors.New("the proxy makes no connection")

// maxAnswer bounds the head with which a proxy answers, bytes.
const maxAnswer = 8 << 10

// reach connects to a place: directly, or through the first proxy of t that makes
// the connection.
func (d *Dialer) reach(ctx context.Context, at place, t *Target) (link, place, error) {
	if len(t.How.Parents) == 0 {
		c, err := d.connect(ctx, at.addr, t.How.Private)
		if err != nil {
			return nil, at, err
		}
		return c, at, nil
	}
	list, err := d.parents(ctx, t)
	if err != nil {
		return nil, at, err
	}
	defer func() {
		for i := range list {
			list[i].try.End()
		}
	}()
	var errs []error
	for i := range list {
		p := &list[i]
		c, err := d.through(ctx, p, at.addr, t, len(list)-i)
		if err == nil {
			at.parent, at.via = p.parent, p.addr
			return c, at, nil
		}
		errs = append(errs, fmt.Errorf("proxy %s: %w", p.parent.Address, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, at, errors.Join(errs...)
}

// A parent is a proxy at one of its addresses, which was screened.
type parent struct {
	parent mesh.Parent
	addr   netip.AddrPort
	try    *upstream.Try
}

// parents are the proxies of t, those first that are well.
func (d *Dialer) parents(ctx context.Context, t *Target) (list []parent, err error) {
	quiet := Target{Host: t.Host, Did: noSpans}
	for _, p := range t.How.Parents {
		found, lerr := d.addresses(ctx, &quiet, []mesh.Outlet{p.Outlet()})
		if lerr != nil {
			err = cmp.Or(err, error(refuse(reasonOf(lerr), "proxy %s: %v", p.Address, lerr)))
			continue
		}
		for _, at := range found {
			if lerr := d.Guard.Screen(at.addr.Addr(), t.How.Private); lerr != nil {
				err = cmp.Or(err, error(refuse(reasonOf(lerr), "proxy %s: %v", p.Address, lerr)))
				continue
			}
			try, _ := d.Outside.Begin(spiffeid.ID{}, "proxy:"+p.Address, "", mesh.Routes{}, false) // all share what is known of it; it has no breaker
			list = append(list, parent{p, netip.AddrPortFrom(at.addr.Addr().Unmap(), at.addr.Port()), try})
		}
	}
	if len(list) == 0 {
		return nil, err
	}
	rank := func(p parent) int { return p.try.Ranks([]netip.AddrPort{p.addr})[0] }
	slices.SortStableFunc(list, func(a, b parent) int { return cmp.Compare(rank(a), rank(b)) })
	return list, nil
}

// through has a proxy connect to an address. It takes no longer than its part of
// the time that is left, of which there are so many.
func (d *Dialer) through(ctx context.Context, p *parent, to netip.AddrPort, t *Target, parts int) (link, error) {
	within, cancel := ctx, context.CancelFunc(func() {})
	if until, ok := ctx.Deadline(); ok {
		within, cancel = context.WithTimeout(ctx, time.Until(until)/time.Duration(parts))
	}
	defer cancel()
	head, err := d.asks(within, p.parent, to)
	if err != nil {
		return nil, err
	}
	c, err := d.toProxy(within, p, t.How.Private)
	if err != nil {
		if !errors.Is(ctx.Err(), context.Canceled) {
			p.try.Unmade(p.addr)
		}
		return nil, errors.Join(errParent, err)
	}
	p.try.On(p.addr)
	p.try.Tell(upstream.OK, time.Now(), 0)
	stop := context.AfterFunc(within, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	_, err = c.Write(head)
	status := 0
	if err == nil {
		status, err = connected(c)
	}
	switch {
	case !stop():
		err = errors.Join(errParent, context.Cause(within))
	case err != nil:
		err = errors.Join(errParent, err)
	case status == 502, status == 504:
		err = fmt.Errorf("it could not connect to %s: status %d", to, status)
	case status/100 != 2:
		err = fmt.Errorf("%w: status %d for %s", errParent, status, to)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// toProxy connects to a proxy, which must prove its name where it is spoken to over
// TLS: before that it is told nothing.
func (d *Dialer) toProxy(ctx context.Context, p *parent, private []netip.Prefix) (link, error) {
	c, err := d.connect(ctx, p.addr, private)
	if err != nil {
		return nil, err
	}
	if !p.parent.TLS() {
		return c, nil
	}
	name, _, _ := net.SplitHostPort(p.parent.Outlet().Address) // without one there is no handshake
	roots, err := rootsOf(p.parent.CA, d.Roots)
	var rc *record.Conn
	if err == nil {
		rc, err = record.Client(ctx, c, &tls.Config{ServerName: name, RootCAs: roots, NextProtos: []string{mesh.ALPNHTTP1}})
	}
	if err == nil {
		return &sealed{Conn: rc, tcp: c}, nil
	}
	c.Close()
	if cert := (*tls.CertificateVerificationError)(nil); errors.As(err, &cert) {
		return nil, refuse(ReasonCertificate, "proxy %s did not prove its name: %s", p.parent.Address, clip(cert.Err.Error()))
	}
	return nil, fmt.Errorf("speak TLS: %w", err)
}

// asks is the request for a connection. It fails rather than leave out who we are.
func (d *Dialer) asks(ctx context.Context, p mesh.Parent, to netip.AddrPort) ([]byte, error) {
	head := fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", to, to)
	if p.Credentials != "" {
		value, err := d.Secrets.Value(ctx, p.Credentials)
		if err == nil && !strings.Contains(value, ":") {
			err = fmt.Errorf("secret %s is not USER:PASSWORD", p.Credentials)
		}
		if err != nil {
			return nil, refuse(ReasonSecret, "%v", err)
		}
		head = fmt.Appendf(head, "Proxy-Authorization: Basic %s\r\n", base64.StdEncoding.EncodeToString([]byte(value)))
	}
	return append(head, "\r\n"...), nil
}

// connected reads the head of the answer to CONNECT, and no byte of what follows,
// which is the host's. It gives the status.
func connected(r io.Reader) (int, error) {
	var head []byte
	for one := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, one[0]) {
		if len(head) == maxAnswer {
			return 0, fmt.Errorf("the head of its answer has more than %d bytes", maxAnswer)
		}
		if _, err := io.ReadFull(r, one); err != nil {
			return 0, fmt.Errorf("read its answer: %w", err)
		}
	}
	line, _, _ := bytes.Cut(head, []byte("\r\n"))
	version, rest, _ := strings.Cut(string(line), " ")
	code, _, _ := strings.Cut(rest, " ")
	if version != "HTTP/1.1" && version != "HTTP/1.0" || len(code) != 3 || code[0] < '2' || code[0] > '5' || strings.Trim(code, "0123456789") != "" {
		return 0, errors.New("its answer is no HTTP") // which may repeat the credentials
	}
	return int(code[0]-'0')*100 + int(code[1]-'0')*10 + int(code[2]-'0'), nil
}
