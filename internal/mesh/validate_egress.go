package mesh

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"
)

func (v *validator) destinations() {
	seen := map[string]Origin{}
	for _, d := range v.p.Destinations {
		if err := checkHostRef(d.Host); d.Host == "" {
			v.missing(d.Origin, "host")
		} else if err != nil {
			v.item(d.Origin, d.Host, "%s", err)
		} else {
			twice(v, seen, d.Host, d.Origin, "host")
		}
		v.spoken(&d)
		switch {
		case d.DNS != "" && d.DNS != RealAddresses:
			v.item(d.Origin, d.DNS, "unknown dns %q%s", d.DNS, didYouMean(d.DNS, []string{"virtual", RealAddresses}))
		case d.DNS != "" && isAddress(d.Host):
			v.item(d.Origin, "dns:", "dns has no meaning for an address: leave it out")
		}
		for _, p := range d.Private {
			v.private(d.Origin, p)
		}
		for _, e := range d.Endpoints {
			if !e.IsValid() || e.Port() == 0 || e.Addr().Zone() != "" || e.Addr().Is4In6() {
				v.item(d.Origin, e.String(), "endpoint %q is not an address and a port", e)
			}
		}
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
	case d.TLS != "" && d.TLS != Originate:
		v.item(d.Origin, d.TLS, "unknown tls %q%s", d.TLS, didYouMean(d.TLS, []string{"passthrough", Originate}))
	case d.TLS == Originate && d.Proto != ProtoHTTP:
		v.item(d.Origin, "proto:", "tls: originate takes requests of HTTP in the clear: write proto: http, or leave it out")
	case d.TLS == Originate && isAddress(d.Host):
		v.item(d.Origin, d.Host, "host %q is an address: tls: originate needs the name that the host's certificate is for", d.Host)
	}
	if d.CA == "" {
		return
	}
	if d.TLS == "" {
		v.item(d.Origin, "ca:", "ca has no meaning where the gateway speaks no TLS: write tls: originate, or leave it out")
		return
	}
	if _, err := ParseCA(d.CA); err != nil {
		v.item(d.Origin, "ca:", "ca: %s", err)
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
