package egress

import (
	"net/netip"
	"strconv"
	"strings"
)

// A Host is where a tunnel leads: a DNS name in its one normal form, or an
// address. The zero Host is neither.
type Host struct {
	name string
	addr netip.Addr
}

// Addr returns the address of a literal, and whether h is one.
func (h Host) Addr() (netip.Addr, bool) { return h.addr, h.addr.IsValid() }

// String returns the name in lower case without trailing dot, or the address
// in canonical form without brackets.
func (h Host) String() string {
	if h.addr.IsValid() {
		return h.addr.String()
	}
	return h.name
}

// ParseName returns the normal form of a fully qualified DNS name: ASCII
// letters, digits, hyphen and underscore, in lower case, one trailing dot
// dropped, at least two labels of 1 to 63 bytes, 253 bytes in all. A name that
// any resolver could read as an address (last label numeric or 0x) is refused,
// and nothing is mapped: an internationalised name comes as A-labels.
func ParseName(s string) (string, error) {
	name := strings.TrimSuffix(s, ".")
	if name == "" {
		return "", refuse(ReasonName, "host name is empty")
	}
	if len(name) > 253 {
		return "", refuse(ReasonName, "host name has %d bytes; 253 is the limit", len(name))
	}
	upper, labels, start := false, 0, 0
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if err := checkLabel(name, name[start:i]); err != nil {
				return "", err
			}
			labels++
			start = i + 1
			continue
		}
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
		case 'A' <= c && c <= 'Z':
			upper = true
		default:
			return "", refuse(ReasonName, "host name %s holds byte 0x%02x; letters, digits, '-', '_' and '.' are accepted", clip(name), c)
		}
	}
	last := name[strings.LastIndexByte(name, '.')+1:]
	if numeric(last) {
		return "", refuse(ReasonName, "host %s looks like an address: its last label is a number", clip(name))
	}
	if labels < 2 {
		return "", refuse(ReasonName, "host %s is a single label; a fully qualified name is needed", clip(name))
	}
	if upper {
		name = strings.ToLower(name)
	}
	return name, nil
}

func checkLabel(name, label string) error {
	switch {
	case label == "":
		return refuse(ReasonName, "host name %s has an empty label", clip(name))
	case len(label) > 63:
		return refuse(ReasonName, "host name %s has a label of %d bytes; 63 is the limit", clip(name), len(label))
	case label[0] == '-' || label[len(label)-1] == '-':
		return refuse(ReasonName, "host name %s has a label that starts or ends with '-'", clip(name))
	}
	return nil
}

// numeric reports whether inet_aton or a URL parser would take a name ending
// in label for an IPv4 address.
func numeric(label string) bool {
	if len(label) >= 2 && label[0] == '0' && label[1]|0x20 == 'x' {
		return true
	}
	for i := 0; i < len(label); i++ {
		if label[i] < '0' || label[i] > '9' {
			return false
		}
	}
	return true
}

// ParseHost reads a name or an address without brackets. IPv4 is four decimal
// numbers without leading zeros. An IPv4-mapped address becomes the IPv4
// address; a zone is refused.
func ParseHost(s string) (Host, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		if addr.Zone() != "" {
			return Host{}, refuse(ReasonName, "address %s has a zone; zones are not accepted", clip(s))
		}
		return Host{addr: addr.Unmap()}, nil
	}
	name, err := ParseName(s)
	if err != nil {
		return Host{}, err
	}
	return Host{name: name}, nil
}

// ParseAuthority reads the authority form of CONNECT (RFC 9112, 3.2.3): host,
// colon, port. An IPv6 address stands in brackets. Userinfo, a missing port,
// port 0, signs and leading zeros are refused.
func ParseAuthority(s string) (Host, uint16, error) {
	if strings.IndexByte(s, '@') >= 0 {
		return Host{}, 0, refuse(ReasonName, "authority %s has userinfo; host:port is accepted", clip(s))
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return Host{}, 0, refuse(ReasonName, "authority %s has no port; host:port is accepted", clip(s))
	}
	port, err := parsePort(s[i+1:])
	if err != nil {
		return Host{}, 0, err
	}
	text := s[:i]
	if strings.HasPrefix(text, "[") {
		if !strings.HasSuffix(text, "]") {
			return Host{}, 0, refuse(ReasonName, "authority %s has an unclosed bracket", clip(s))
		}
		text = text[1 : len(text)-1]
		if strings.IndexByte(text, ':') < 0 {
			return Host{}, 0, refuse(ReasonName, "authority %s has brackets around something that is not an IPv6 address", clip(s))
		}
	} else if strings.IndexByte(text, ':') >= 0 {
		return Host{}, 0, refuse(ReasonName, "authority %s has a colon in the host; an IPv6 address stands in brackets", clip(s))
	}
	h, err := ParseHost(text)
	if err != nil {
		return Host{}, 0, err
	}
	return h, port, nil
}

func parsePort(s string) (uint16, error) {
	if s == "" || len(s) > 5 || s[0] == '0' {
		return 0, refuse(ReasonName, "port %s is not a decimal number from 1 to 65535", clip(s))
	}
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return 0, refuse(ReasonName, "port %s is not a decimal number from 1 to 65535", clip(s))
		}
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, refuse(ReasonName, "port %s is not a decimal number from 1 to 65535", clip(s))
	}
	return uint16(n), nil
}
