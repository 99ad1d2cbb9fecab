package mesh

import (
	"slices"
	"strings"
)

// maxALPN is how many protocols a destination may list.
const maxALPN = 16

// offered checks what is agreed on in the hellos of TLS: protocols, and who the
// host is.
func (v *validator) offered(d *Destination) {
	if d.Probe {
		switch {
		case d.TLS != "":
			v.item(d.Origin, "probe:", "probe has no meaning with tls: %s, where the gateway looks at every certificate: leave it out", d.TLS)
		case d.Proto != ProtoTLS:
			v.item(d.Origin, "probe:", "probe has no meaning for proto %s, which shows no certificate: leave it out", d.Proto)
		case isAddress(d.Host):
			v.item(d.Origin, "probe:", "host %q is an address: probe needs the name that the host's certificate is for", d.Host)
		}
	}
	switch {
	case d.ECH != "" && d.ECH != AllowGREASE:
		v.item(d.Origin, d.ECH, "unknown ech %q%s", clip(d.ECH), didYouMean(d.ECH, []string{"deny", AllowGREASE}))
	case d.ECH != "" && (d.Proto != ProtoTLS || isAddress(d.Host)):
		v.item(d.Origin, "ech:", "ech has no meaning where no hello names the host: leave it out")
	}
	if len(d.ALPN) == 0 {
		return
	}
	if d.Proto != ProtoTLS && d.TLS == "" {
		v.item(d.Origin, "alpn:", "alpn has no meaning for proto %s, which sends no hello: leave it out", d.Proto)
		return
	}
	if len(d.ALPN) > maxALPN {
		v.item(d.Origin, "alpn:", "alpn: %d protocols are more than %d", len(d.ALPN), maxALPN)
	}
	for i, p := range d.ALPN {
		switch {
		case p == "" || len(p) > 255 || strings.ContainsFunc(p, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
			v.item(d.Origin, "alpn:", "alpn: %q is not 1 to 255 printable characters", clip(p))
		case slices.Contains(d.ALPN[:i], p):
			v.item(d.Origin, "alpn:", "alpn: %q is written twice", p)
		case p == "h3" || strings.HasPrefix(p, "h3-") || p == "doq":
			v.item(d.Origin, "alpn:", "alpn: %q is spoken over QUIC, which no gateway carries", p)
		case d.TLS != "" && p != ALPNHTTP1 && p != ALPNHTTP2:
			v.item(d.Origin, "alpn:", "alpn: with tls: %s the gateway speaks %s and %s, not %q", d.TLS, ALPNHTTP2, ALPNHTTP1, p)
		}
	}
}

// upgrades checks what connections may become.
func (v *validator) upgrades(d *Destination) {
	if len(d.Upgrade) == 0 {
		return
	}
	switch {
	case d.TLS == "" && d.Proto != ProtoHTTP:
		v.item(d.Origin, "upgrade:", "upgrade has no meaning where the gateway sees no requests: write tls: originate, tls: inspect or proto: http, or leave it out")
	case len(d.ALPN) > 0 && !slices.Contains(d.ALPN, ALPNHTTP1):
		v.item(d.Origin, "upgrade:", "upgrade: a WebSocket is asked for over HTTP/1.1: add %s to alpn", ALPNHTTP1)
	case d.Inject != nil && d.Inject.always():
		v.item(d.Origin, "upgrade:", "upgrade has no effect where each request gets a credential, since what goes through a WebSocket is not searched for it: have inject leave out the paths of the WebSockets, or leave it out")
	}
	for i, u := range d.Upgrade {
		switch {
		case u != WebSocket:
			v.item(d.Origin, u, "upgrade: unknown protocol %q%s", clip(u), didYouMean(u, []string{WebSocket}))
		case slices.Contains(d.Upgrade[:i], u):
			v.item(d.Origin, "upgrade:", "upgrade: %q is written twice", u)
		}
	}
}
