package egress

import (
	"cmp"

	"sallyport/internal/mesh"
)

const (
	sniStrict   = "strict"
	sniOptional = "optional"
)

// routeOf says how s reaches h. A name that no destination lists is reached in
// the default way: TLS under its own name, public addresses. An address that
// none lists is refused.
func routeOf(s *mesh.Snapshot, h Host) (mesh.Destination, error) {
	name := h.String()
	how, found := s.DestinationOf(name)
	if !found {
		how = mesh.Destination{Host: name}
		if _, literal := h.Addr(); literal {
			return how, refuse(ReasonLiteral, "%s is an address, and no destination lists it", name)
		}
	}
	how.Proto = cmp.Or(how.Proto, mesh.ProtoTLS)
	how.SNI = cmp.Or(how.SNI, sniStrict)
	switch {
	case how.Proto == mesh.ProtoTCP && how.TLS == "", how.Proto == mesh.ProtoTLS && (how.TLS == "" || how.TLS == mesh.Inspect):
	case how.Proto == mesh.ProtoHTTP && (how.TLS == "" || how.TLS == mesh.Originate):
	default:
		return how, refuse(ReasonNoPolicy, "the destination of %s has protocol %q and tls %q, which this gateway does not know", name, how.Proto, how.TLS)
	}
	return how, nil
}

// asksHTTP says whether the gateway asks the host itself, request by request.
func asksHTTP(how mesh.Destination) bool { return !how.Opaque() }

// protocolsOf are what may be spoken with the host, in TLS; nil for anything.
func protocolsOf(how *mesh.Destination) []string {
	if len(how.ALPN) == 0 && how.TLS != "" {
		return []string{mesh.ALPNHTTP1}
	}
	return how.ALPN
}
