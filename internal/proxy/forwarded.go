package proxy

import (
	"bytes"
	"fmt"
	"net/netip"
)

// An introduction is what the application is told of where a call comes from:
// by whom, from which address, over what, and for which name. It stands in the
// fields that applications know for that, and takes the place of whatever the
// call itself says there.
type introduction struct {
	always  []byte // the lines that hold for the whole connection
	forPeer string // the element of Forwarded that names the peer

	authority []byte // of the call before; named are the lines that name it
	named     []byte
}

func introduce(self, peer, remote string) introduction {
	i := introduction{always: fmt.Appendf(nil, "X-Forwarded-Client-Cert: By=%s;URI=%s\r\nX-Forwarded-Proto: https\r\n", self, peer), forPeer: "unknown"}
	a, err := netip.ParseAddrPort(remote)
	if err != nil {
		return i // a connection of no known address
	}
	ip := a.Addr().Unmap().WithZone("")
	i.always = fmt.Appendf(i.always, "X-Forwarded-For: %s\r\n", ip)
	if i.forPeer = ip.String(); ip.Is6() {
		i.forPeer = `"[` + i.forPeer + `]"` // RFC 7239 section 6
	}
	return i
}

// append adds the lines for a call that asks for authority, which is checked
// and holds no byte that would have to be escaped.
func (i *introduction) append(b, authority []byte) []byte {
	if i.named == nil || !bytes.Equal(i.authority, authority) {
		i.authority = append(i.authority[:0], authority...)
		i.named = fmt.Appendf(i.named[:0], "X-Forwarded-Host: %s\r\nForwarded: for=%s;host=\"%s\";proto=https\r\n", authority, i.forPeer, authority)
	}
	return append(append(b, i.always...), i.named...)
}

// introduction tells the application about the caller.
func (in *Inbound) introduction(x *call) *refusal {
	x.extra = x.intro.append(x.extra, x.req.Authority)
	return nil
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
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.', c == ':', c == '=', c == '+', c == '/':
		default:
			return false
		}
	}
	return len(id) > 0 && len(id) <= maxRequestID
}
