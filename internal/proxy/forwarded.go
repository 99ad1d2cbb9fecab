package proxy

import (
	"bytes"
	"fmt"
	"net/netip"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// An introduction is what the application is told of where a call comes from:
// by whom, from which address, over what, and for which name. It stands in the
// fields that applications know for that, and takes the place of whatever the
// call itself says there. Of a peer that is trusted with it the addresses that a
// call came through before stand in front of its own.
type introduction struct {
	always  []byte     // the lines that hold for the whole connection
	peer    netip.Addr // not valid: the connection has no known address
	trusted bool

	authority []byte // of the call before; named are the lines that name it
	named     []byte
}

func introduce(self, peer, remote string, trusted bool) introduction {
	i := introduction{always: fmt.Appendf(nil, "X-Forwarded-Client-Cert: By=%s;URI=%s\r\nX-Forwarded-Proto: https\r\n", self, peer), trusted: trusted}
	if a, err := netip.ParseAddrPort(remote); err == nil {
		i.peer = a.Addr().Unmap().WithZone("")
	}
	return i
}

// append adds the lines for a call that asks for authority, which is checked
// and holds no byte that would have to be escaped.
func (i *introduction) append(b, authority []byte, fields []http1.Field) []byte {
	b = append(b, i.always...)
	if i.trusted {
		if before := forwardedFor(fields); len(before) > 0 {
			return i.lines(b, authority, before)
		}
	}
	if i.named == nil || !bytes.Equal(i.authority, authority) {
		i.authority = append(i.authority[:0], authority...)
		i.named = i.lines(i.named[:0], authority, nil)
	}
	return append(b, i.named...)
}

// lines adds what depends on the call. Both fields tell the same addresses.
func (i *introduction) lines(b, authority []byte, through []netip.Addr) []byte {
	b = fmt.Appendf(b, "X-Forwarded-Host: %s\r\n", authority)
	if i.peer.IsValid() {
		through = append(through, i.peer)
	}
	b = appendForwardedFor(b, through)
	b = append(b, "Forwarded: "...)
	for n, a := range through {
		if n > 0 {
			b = append(b, ", "...)
		}
		if a.Is6() {
			b = fmt.Appendf(b, `for="[%s]"`, a) // RFC 7239 section 6
		} else {
			b = fmt.Appendf(b, "for=%s", a)
		}
	}
	switch {
	case i.peer.IsValid():
	case len(through) > 0:
		b = append(b, ", for=unknown"...)
	default:
		b = append(b, "for=unknown"...)
	}
	return fmt.Appendf(b, ";host=\"%s\";proto=https\r\n", authority)
}

// maxForwarded is how many addresses of X-Forwarded-For are passed on.
const maxForwarded = 32

// forwardedFor reads the addresses that a call came through from
// X-Forwarded-For, the nearest last. Each proxy adds its own at the end, so what
// stands before something that is no address is only the word of a client: it
// is left out, as what is too far away is.
func forwardedFor(fields []http1.Field) []netip.Addr {
	var near [maxForwarded]netip.Addr
	at := len(near)
	for i := len(fields) - 1; i >= 0; i-- {
		if !is(fields[i].Name, "x-forwarded-for") {
			continue
		}
		for rest, more := fields[i].Value, true; more; {
			var item []byte
			if n := bytes.LastIndexByte(rest, ','); n >= 0 {
				item, rest = rest[n+1:], rest[:n]
			} else {
				item, more = rest, false
			}
			a, ok := parseHop(string(bytes.Trim(item, " \t")))
			if !ok || at == 0 {
				return near[at:]
			}
			at--
			near[at] = a
		}
	}
	return near[at:]
}

// parseHop reads an address, which some proxies write with a port.
func parseHop(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		var ap netip.AddrPort
		if ap, err = netip.ParseAddrPort(s); err == nil {
			a = ap.Addr()
		} else if n := len(s); n > 2 && s[0] == '[' && s[n-1] == ']' {
			a, err = netip.ParseAddr(s[1 : n-1])
		}
	}
	return a.Unmap().WithZone(""), err == nil
}

func appendForwardedFor(b []byte, through []netip.Addr) []byte {
	for n, a := range through {
		if n == 0 {
			b = append(b, "X-Forwarded-For: "...)
		} else {
			b = append(b, ", "...)
		}
		b = a.AppendTo(b)
	}
	if len(through) > 0 {
		b = append(b, '\r', '\n')
	}
	return b
}

// introduction tells the application about the caller.
func (in *Inbound) introduction(x *call) *refusal {
	x.extra = x.intro.append(x.extra, x.req.Authority, x.req.Fields)
	return nil
}

// anyOf says whether an identity is meant by one of the patterns.
func anyOf(patterns []string, id string) bool {
	for _, p := range patterns {
		if mesh.MatchSrc(p, id) {
			return true
		}
	}
	return false
}

// maxRequestID is the length of a request id that is passed on.
const maxRequestID = 128

// requestID passes on the id by which the caller knows the request, so that
// logs on both sides can be joined. One that could mean something else in a
// log, and one of several, is replaced by the trace.
func (x *call) requestID() {
	var id []byte
	n := 0
	for i := range x.req.Fields {
		if f := &x.req.Fields[i]; is(f.Name, "x-request-id") {
			id = f.Value
			n++
		}
	}
	x.extra = append(x.extra, "X-Request-Id: "...)
	if n == 1 && plainID(id) {
		x.extra = append(x.extra, id...)
	} else {
		x.extra = x.trace.AppendID(x.extra)
	}
	x.extra = append(x.extra, '\r', '\n')
}

func plainID(id []byte) bool {
	for _, c := range id {
		if !plainInID[c] {
			return false
		}
	}
	return len(id) > 0 && len(id) <= maxRequestID
}

// plainInID are the bytes that mean nothing in any log.
var plainInID = func() (t [256]bool) {
	for _, c := range []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:=+/") {
		t[c] = true
	}
	return t
}()
