package egress

import (
	"cmp"

	"sallyport/internal/mesh"
)

const (
	protoTLS    = "tls"
	protoTCP    = "tcp"
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
	how.Proto = cmp.Or(how.Proto, protoTLS)
	how.SNI = cmp.Or(how.SNI, sniStrict)
	if how.Proto != protoTLS && how.Proto != protoTCP {
		return how, refuse(ReasonNoPolicy, "the destination of %s has protocol %q, which this gateway does not know", name, how.Proto)
	}
	return how, nil
}
