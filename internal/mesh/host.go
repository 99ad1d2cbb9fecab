package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// CheckHost accepts a lower-case ASCII DNS name of letters, digits and hyphens,
// and nothing that some resolver might read as an address: no last label that
// is a number, decimal, octal or hexadecimal.
func CheckHost(name string) error {
	switch {
	case name == "":
		return errors.New("host name is empty")
	case len(name) > 253:
		return fmt.Errorf("host name has %d characters, more than 253", len(name))
	case strings.HasSuffix(name, "."):
		return fmt.Errorf("host %q ends with a dot: leave it out", clip(name))
	case strings.ContainsAny(name, ":/"):
		return fmt.Errorf("host %q holds more than a name: no scheme, port or path", clip(name))
	}
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if err := checkLabel(l); err != nil {
			return fmt.Errorf("host %q: %w", clip(name), err)
		}
	}
	if looksNumeric(labels[len(labels)-1]) {
		return fmt.Errorf("host %q could be read as an address: its last label is a number", clip(name))
	}
	return nil
}

// CheckHostPattern accepts what CheckHost does, or "*." before a name that has
// at least two labels.
func CheckHostPattern(p string) error {
	apex, wild := strings.CutPrefix(p, "*.")
	if strings.Contains(apex, "*") {
		return fmt.Errorf("host %q: * stands only for the whole first label", clip(p))
	}
	if err := CheckHost(apex); err != nil {
		return err
	}
	if wild && !strings.Contains(apex, ".") {
		return fmt.Errorf("host %q is a pattern for a whole top-level domain", clip(p))
	}
	return nil
}

func checkLabel(l string) error {
	switch {
	case l == "":
		return errors.New("a label is empty")
	case len(l) > 63:
		return fmt.Errorf("a label has %d characters, more than 63", len(l))
	case l[0] == '-' || l[len(l)-1] == '-':
		return fmt.Errorf("label %q starts or ends with a hyphen", l)
	}
	for i := range len(l) {
		c := l[i]
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-':
		case c >= 'A' && c <= 'Z':
			return fmt.Errorf("label %q has capital letters: write %q", l, strings.ToLower(l))
		case c >= 0x80:
			return fmt.Errorf("label %q is not ASCII: write its xn-- form", l)
		default:
			return fmt.Errorf("label %q has %q: only letters, digits and hyphens are possible", l, string(rune(c)))
		}
	}
	return nil
}

// looksNumeric reports what the WHATWG host parser and inet_aton would take for
// the end of an IPv4 address.
func looksNumeric(l string) bool {
	if strings.HasPrefix(l, "0x") {
		return strings.Trim(l[2:], "0123456789abcdef") == ""
	}
	return strings.Trim(l, "0123456789") == ""
}

func isAddress(h string) bool {
	_, err := netip.ParseAddr(h)
	return err == nil
}

// CheckHostRef accepts what may stand after "host:" in a rule: a name, a
// pattern, or an address as netip writes it.
func CheckHostRef(h string) error {
	if a, err := netip.ParseAddr(h); err == nil {
		switch {
		case a.Zone() != "":
			return fmt.Errorf("address %q has a zone", h)
		case a.Is4In6():
			return fmt.Errorf("address %q is written as %s", h, a.Unmap())
		case a.String() != h:
			return fmt.Errorf("address %q is written as %s", h, a)
		}
		return nil
	}
	return CheckHostPattern(h)
}
