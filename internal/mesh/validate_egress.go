package mesh

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

func (v *validator) destinations() {
	seen := map[string]Origin{}
	for _, d := range v.p.Destinations {
		if err := CheckHostRef(d.Host); d.Host == "" {
			v.missing(d.Origin, "host")
		} else if err != nil {
			v.item(d.Origin, d.Host, "%s", err)
		} else {
			twice(v, seen, d.Host, d.Origin, "host")
		}
		v.spoken(&d)
		v.offered(&d)
		v.upgrades(&d)
		switch {
		case d.DNS != "" && d.DNS != RealAddresses:
			v.item(d.Origin, d.DNS, "unknown dns %q%s", d.DNS, didYouMean(d.DNS, []string{"virtual", RealAddresses}))
		case d.DNS != "" && isAddress(d.Host):
			v.item(d.Origin, "dns:", "dns has no meaning for an address: leave it out")
		}
		v.modeOfDestination(d)
		v.budget(d)
		for _, p := range d.Private {
			v.private(d.Origin, p)
		}
		v.outlets(&d)
		if len(d.Endpoints) > 0 && strings.HasPrefix(d.Host, "*.") {
			v.item(d.Origin, "endpoints:", "endpoints of pattern %q would serve every name below it: write one destination per host", d.Host)
		}
		if d.ConnectTimeout < 0 || d.ConnectTimeout > time.Minute {
			v.item(d.Origin, "connect_timeout:", "connect_timeout %s is not from 0 to 1m", d.ConnectTimeout)
		}
	}
}

// spoken checks what the workload speaks, and what the host does.
func (v *validator) spoken(d *Destination) {
	switch {
	case d.Proto != ProtoTLS && d.Proto != ProtoHTTP && d.Proto != ProtoTCP:
		v.item(d.Origin, d.Proto, "unknown proto %q%s", d.Proto, didYouMean(d.Proto, []string{ProtoTLS, ProtoHTTP, ProtoTCP}))
	case d.Proto != ProtoTLS && d.SNI != "":
		v.item(d.Origin, "sni:", "sni has no meaning for proto %s: leave it out", d.Proto)
	case d.Proto == ProtoTLS && d.SNI == "strict" && isAddress(d.Host):
		v.item(d.Origin, d.Host, "host %q is an address, which no TLS hello names: write sni: optional or proto: tcp", d.Host)
	case d.Proto == ProtoTLS && d.SNI != "strict" && d.SNI != "optional":
		v.item(d.Origin, d.SNI, "unknown sni %q%s", d.SNI, didYouMean(d.SNI, []string{"strict", "optional"}))
	}
	switch {
	case d.TLS != "" && d.TLS != Originate && d.TLS != Inspect:
		v.item(d.Origin, d.TLS, "unknown tls %q%s", d.TLS, didYouMean(d.TLS, []string{"passthrough", Originate, Inspect}))
	case d.TLS == Inspect && d.Proto != ProtoTLS:
		v.item(d.Origin, "proto:", "tls: inspect takes requests over TLS: write proto: tls, or leave it out")
	case d.TLS == Originate && d.Proto != ProtoHTTP:
		v.item(d.Origin, "proto:", "tls: originate takes requests of HTTP in the clear: write proto: http, or leave it out")
	case d.TLS != "" && isAddress(d.Host):
		v.item(d.Origin, d.Host, "host %q is an address: tls: %s needs the name that the host's certificate is for", d.Host, d.TLS)
	}
	if d.Inject != nil {
		v.inject(d)
	}
	if d.CA == "" {
		return
	}
	if d.TLS == "" && !d.Probe {
		v.item(d.Origin, "ca:", "ca has no meaning where the gateway speaks no TLS: write tls: originate, tls: inspect or probe: true, or leave it out")
		return
	}
	if _, err := ParseCA(d.CA); err != nil {
		v.item(d.Origin, "ca:", "ca: %s", err)
	}
}

// notInjected are fields that say how a message is read, or whom it is for.
var notInjected = []string{"host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade", "expect", "content-encoding", "range", "accept-encoding"}

func (v *validator) inject(d *Destination) {
	i := d.Inject
	if d.TLS == "" {
		v.item(d.Origin, "inject:", "inject has no meaning where the gateway speaks no TLS of its own: write tls: originate or tls: inspect")
	}
	if !plainWord(i.Secret, 64) {
		v.item(d.Origin, "secret:", "inject: secret %q is not 1 to 64 letters, digits, hyphens, dots or underscores: it is the name under which the gateway has it", clip(i.Secret))
	}
	if err := checkFieldName(i.Header); err != nil {
		v.item(d.Origin, "header:", "inject: header: %s", err)
	} else if slices.Contains(notInjected, strings.ToLower(i.Header)) {
		v.item(d.Origin, "header:", "inject: header %q says how a request is read, and carries no credential", i.Header)
	}
	if len(i.Prefix) > 64 || strings.ContainsFunc(i.Prefix, func(r rune) bool { return r < ' ' || r >= 0x7f }) {
		v.item(d.Origin, "prefix:", "inject: prefix %q is not at most 64 printable characters", clip(i.Prefix))
	}
	if len(i.Paths) == 0 {
		v.item(d.Origin, "inject:", `inject: paths is missing: say which requests get the credential, such as ["/v1/**"]`)
	}
	for _, p := range i.Paths {
		if err := checkPath("GET", p); err != nil {
			v.item(d.Origin, p, "inject: %s", err)
		}
	}
}

// ParseCA reads Destination.CA.
func ParseCA(text string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	rest := []byte(text)
	for len(bytes.TrimSpace(rest)) > 0 {
		block, after := pem.Decode(rest)
		switch {
		case block == nil:
			return nil, errors.New("is not certificates in PEM, one after the other")
		case block.Type != "CERTIFICATE":
			return nil, fmt.Errorf("holds a block %q: only certificates may be there", clip(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("holds a certificate that cannot be read: %w", err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("holds the certificate of %q, which is not an authority's", clip(c.Subject.String()))
		}
		out, rest = append(out, c), after
	}
	if len(out) == 0 {
		return nil, errors.New("holds no certificate")
	}
	return out, nil
}

// maxHourly bounds a budget of bytes: 1 PiB.
const maxHourly = 1 << 50

// maxNames bounds a budget of names, each of which a gateway remembers.
const maxNames = 100_000

// budget refuses what is no amount.
func (v *validator) budget(d Destination) {
	for field, n := range map[string]int64{"up": d.Budget.Up, "down": d.Budget.Down} {
		if n < 0 || n > maxHourly {
			v.item(d.Origin, field+":", "budget.%s: %d is no number of bytes in an hour", field, n)
		}
	}
	if n := d.Budget.Conns; n < 0 || n > 1_000_000 {
		v.item(d.Origin, "conns:", "budget.conns: %d is not between 1 and 1000000", n)
	}
	switch n := d.Budget.Names; {
	case n < 0 || n > maxNames:
		v.item(d.Origin, "names:", "budget.names: %d is not between 1 and %d", n, maxNames)
	case n > 0 && !strings.HasPrefix(d.Host, "*."):
		v.item(d.Origin, "names:", "budget.names bounds the names below a pattern, and host %q is one name: leave it out", d.Host)
	}
}
