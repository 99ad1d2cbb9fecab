package mesh

import (
	"cmp"
	"encoding/json"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// An Outlet is a place where a host outside is reached. In files and on the wire
// one of which only Address is said is that text, which is all that older proxies
// know: they refuse a set with any other, and keep the one before.
type Outlet struct {
	// Address is an IP address and a port, or a name and a port, which the gateway
	// resolves.
	Address string `json:"address"`
	// Weight of all weights of a priority is the share of the calls. When no endpoint
	// has a weight or a priority, they are tried in the order of the list; else 0
	// is 1.
	Weight uint32 `json:"weight,omitempty"`
	// Priority: an endpoint with a larger one is tried when none with a smaller one
	// is well.
	Priority uint8 `json:"priority,omitempty"`
}

func (o *Outlet) brief(text string) { o.Address = text }

// outletFields is an Outlet as JSON has it with more than its address.
type outletFields Outlet

// MarshalJSON is as the type says.
func (o Outlet) MarshalJSON() ([]byte, error) {
	if o == (Outlet{Address: o.Address}) {
		return json.Marshal(o.Address)
	}
	return json.Marshal(outletFields(o))
}

// UnmarshalJSON is as the type says.
func (o *Outlet) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*o = Outlet{}
		return json.Unmarshal(b, &o.Address)
	}
	return json.Unmarshal(b, (*outletFields)(o))
}

// A Parent is a proxy that connections go through.
type Parent struct {
	// Address is as that of an Outlet, behind "https://" for a proxy that is spoken to
	// over TLS, whose certificate must be for it.
	Address string `json:"address"`
	// CA are certificates in PEM, to which that of the proxy must lead. Default: those
	// that the gateway's system trusts.
	CA string `json:"ca,omitempty"`
	// Credentials is the name that the gateway's configuration has a secret under,
	// USER:PASSWORD, for a proxy that asks who we are.
	Credentials string `json:"credentials,omitempty"`
}

func (p *Parent) brief(text string) { p.Address = text }

// Outlet is where the proxy is.
func (p Parent) Outlet() Outlet { return Outlet{Address: strings.TrimPrefix(p.Address, overTLS)} }

// TLS says that the proxy is spoken to over TLS.
func (p Parent) TLS() bool { return strings.HasPrefix(p.Address, overTLS) }

const overTLS = "https://"

// maxParents bounds the proxies of a destination.
const maxParents = 4

// AddrPort is the address, false for a name.
func (o Outlet) AddrPort() (netip.AddrPort, bool) {
	ap, err := netip.ParseAddrPort(o.Address)
	return ap, err == nil
}

// Name is the name and the port of an outlet that has no address.
func (o Outlet) Name() (host string, port uint16) {
	host, text, _ := net.SplitHostPort(o.Address)
	n, _ := strconv.ParseUint(text, 10, 16)
	return host, uint16(n)
}

// Resilience is what is done when a host outside is late or fails. Breaker, Retry,
// RetryBudget and the timeouts but Connect and Idle need that requests are seen.
type Resilience struct {
	// Parents are proxies, through one of which all connections go: the first that can
	// be connected to. They are told an address that was screened, and no name.
	Parents  []Parent `json:"proxies,omitempty"`
	Timeouts Timeouts `json:"timeouts,omitzero"`
	// Retry tries again what is safe to repeat, at another address first; nil: nothing
	// is. RetryBudget bounds the retries.
	Retry       *Retry `json:"retry,omitempty"`
	RetryBudget Budget `json:"retry_budget,omitzero"`
	// Breaker cuts the host off while it keeps failing, and Outlier puts single
	// addresses aside.
	Breaker *Breaker `json:"breaker,omitempty"`
	Outlier *Outlier `json:"outlier,omitempty"`
}

// Remembered says whether what becomes of calls to the host has a meaning for those
// that follow.
func (d *Destination) Remembered() bool {
	return d.Retry != nil || d.Breaker != nil || d.Outlier != nil || d.Weighted() || len(d.Parents) > 0
}

// Judged is how the host and its addresses are judged, as of a service of the mesh.
func (r *Resilience) Judged() Routes {
	return Routes{Breaker: r.Breaker, Outlier: r.Outlier, Budget: r.RetryBudget}
}

// ConnectWithin bounds one dial.
func (d *Destination) ConnectWithin() time.Duration {
	return cmp.Or(d.Timeouts.Connect, d.ConnectTimeout, 5*time.Second)
}

// Weighted says whether the endpoints share the calls, and are not tried in the
// order of the list.
func (d *Destination) Weighted() bool {
	for _, e := range d.Endpoints {
		if e.Weight > 0 || e.Priority > 0 {
			return true
		}
	}
	return false
}

// Opaque says that nobody sees the requests in the tunnels to the host.
func (d *Destination) Opaque() bool { return d.TLS == "" && d.Proto != ProtoHTTP }

// PortOf is the port of the host that a request for a port leads to, and by which it
// is judged: who says http means the port of https where the gateway makes that of it.
func (d *Destination) PortOf(port uint16) uint16 {
	if d.TLS == Originate && port == 80 {
		return 443
	}
	return port
}

// outlets checks where the host is reached, and what is done when it fails.
func (v *validator) outlets(d *Destination) {
	if len(d.Endpoints) > maxBackends {
		v.item(d.Origin, "endpoints:", "%d endpoints are more than %d", len(d.Endpoints), maxBackends)
	}
	seen := map[string]Origin{}
	for _, e := range d.Endpoints {
		v.outletAddress(d, "endpoint", e.Address)
		twice(v, seen, e.Address, d.Origin, "endpoint")
		if e.Weight > maxWeight {
			v.item(d.Origin, "weight:", "endpoints: weight %d is more than %d", e.Weight, maxWeight)
		}
	}
	if len(d.Parents) > maxParents {
		v.item(d.Origin, "proxies:", "%d proxies are more than %d", len(d.Parents), maxParents)
	}
	for _, p := range d.Parents {
		v.outletAddress(d, "proxy", p.Outlet().Address)
		twice(v, seen, p.Outlet().Address, d.Origin, "endpoint or proxy")
		if p.CA != "" {
			v.proxyCA(d, p)
		}
		if p.Credentials != "" && !plainWord(p.Credentials, 64) {
			v.item(d.Origin, "credentials:", "proxies: credentials %q is not 1 to 64 letters, digits, hyphens, dots or underscores: it is the name under which the gateway has USER:PASSWORD", clip(p.Credentials))
		}
	}
	judged := d.Judged()
	judged.Host = d.Host
	c := routeChecker{validator: v, at: d.Origin, file: &judged}
	c.patience(&Route{Timeouts: d.Timeouts, Retry: d.Retry})
	c.choice()
	if y := d.Retry; y != nil && (y.Unsafe || len(y.GRPC) > 0) {
		v.item(d.Origin, "retry:", "retry: unsafe and grpc have no meaning for a host outside: what may have been acted on is tried again only for GET, HEAD, OPTIONS, PUT and DELETE")
	}
	if d.RetryBudget != (Budget{}) && d.Retry == nil {
		v.item(d.Origin, "retry_budget:", "retry_budget has no meaning without retry: write retry: {attempts: 1}, or leave it out")
	}
	if d.ConnectTimeout > 0 && d.Timeouts.Connect > 0 {
		v.item(d.Origin, "connect_timeout:", "connect_timeout and timeouts.connect are the same: write one of them")
	}
	if !d.Opaque() {
		return
	}
	for _, p := range []struct {
		field string
		there bool
	}{
		{"request", d.Timeouts.Request > 0}, {"backend_request", d.Timeouts.Try > 0},
		{"retry", d.Retry != nil}, {"breaker", d.Breaker != nil},
	} {
		if p.there {
			v.item(d.Origin, p.field+":", "%s has no meaning for tunnels, in which the gateway sees no requests: write tls: originate or tls: inspect, or leave it out", p.field)
		}
	}
}

func (v *validator) proxyCA(d *Destination, p Parent) {
	if !p.TLS() {
		v.item(d.Origin, "ca:", "proxies: ca has no meaning for %s, which is spoken to in the clear: write https:// before its address, or leave it out", p.Address)
	} else if _, err := ParseCA(p.CA); err != nil {
		v.item(d.Origin, "ca:", "proxies: ca of %s %s", p.Address, err)
	}
}

// outletAddress checks an address and a port, or a name and a port.
func (v *validator) outletAddress(d *Destination, what, text string) {
	if a, err := netip.ParseAddrPort(text); err == nil {
		if a.Port() == 0 || a.Addr().Zone() != "" || a.Addr().Is4In6() || a.String() != text {
			v.item(d.Origin, text, "%s %q is not an address and a port as they are usually written, such as 192.0.2.1:443", what, clip(text))
		}
		return
	}
	host, port, err := net.SplitHostPort(text)
	if err == nil {
		err = CheckHost(host)
	}
	if err == nil {
		err = checkPort(port)
	}
	if err != nil || port == "*" || strings.HasPrefix(host, "*") || isAddress(host) {
		v.item(d.Origin, text, "%s %q is neither an address and a port nor a name and a port, such as 192.0.2.1:443 or api.example.com:443", what, clip(text))
	}
}
