package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/svid"
)

// trusted are the roots by which a proxy knows its issuer: those of its
// bootstrap file, and those that it was sent since.
func (i *installed) trusted() (boot, sent []*x509.Certificate, err error) {
	boot, err = readCertificates(i.Issuer.Bundle)
	if b, errSent := svid.LoadBundle(filepath.Join(i.DataDir, "node.json")); errSent == nil {
		sent = b.X509Authorities()
	}
	return boot, sent, err
}

func checkBundle(_ context.Context, x *examination, i *installed) diagnosis {
	fix := "copy bundle.pem from the issuer's data_dir to " + i.Issuer.Bundle
	boot, sent, err := i.trusted()
	switch {
	case errors.Is(err, fs.ErrPermission):
		return skipped("%v", err)
	case err != nil && len(sent) == 0:
		return bad(fix, "%v", err)
	case err != nil:
		return doubtful(fix, "the node has joined, and could not join again: %v", err)
	}
	for _, c := range boot {
		if x.now.Before(c.NotAfter) {
			return good("%s in %s", count(len(boot), "root"), i.Issuer.Bundle)
		}
	}
	return doubtful(fix, "every root in %s has expired, the last at %s", i.Issuer.Bundle, stamp(boot[len(boot)-1].NotAfter))
}

func checkIssuer(ctx context.Context, _ *examination, i *installed) diagnosis {
	td, err := spiffeid.TrustDomainFromString(i.TrustDomain)
	if err != nil {
		return skipped("%v", err)
	}
	boot, sent, err := i.trusted()
	if len(boot)+len(sent) == 0 {
		return skipped("no root is known: %v", err)
	}
	var missed, reached []string
	var last error
	for _, addr := range i.Issuer.Addresses {
		if err := greet(ctx, addr, td, append(boot, sent...)); err != nil {
			missed, last = append(missed, addr), err
			continue
		}
		reached = append(reached, addr)
	}
	switch {
	case len(missed) == 0:
		return good("%s", strings.Join(reached, ", "))
	case errors.Is(last, control.ErrClock):
		return bad("set the clock: timedatectl set-ntp true", "%v", last)
	case errors.Is(last, control.ErrUntrusted) || errors.Is(last, control.ErrTrustDomain):
		return bad("correct issuer.addresses and trust_domain in "+i.config+", or copy bundle.pem from the issuer to "+i.Issuer.Bundle, "%v", last)
	case len(reached) > 0:
		return doubtful("start it, or take it out of issuer.addresses", "%v", last)
	}
	return bad("start the issuer, and let this machine reach "+strings.Join(i.Issuer.Addresses, ", "), "%v", last)
}

// greet has an issuer prove itself.
func greet(ctx context.Context, addr string, td spiffeid.TrustDomain, roots []*x509.Certificate) error {
	c, err := control.Dial(control.ClientConfig{
		Addresses: []string{addr}, TrustDomain: td, Log: slog.New(slog.DiscardHandler),
		Bundle:   func() []*x509.Certificate { return roots },
		Identity: func() (*tls.Certificate, error) { return nil, nil },
	})
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err = c.GetBundle(ctx)
	return err
}

// lateRenewal is the part of an SVID's life, in percent, by which it should
// have been renewed: that begins at half of it, with a tenth of chance.
const lateRenewal = 75

func checkIdentity(_ context.Context, x *examination, i *installed) diagnosis {
	st, err := svid.Load(filepath.Join(i.DataDir, "svids.json"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return bad("see SP008 and SP011; whether an entry names this node: sallyport entry list", "it has no SVID yet")
	case errors.Is(err, svid.ErrExpired):
		return bad("see SP006 and SP011", "every SVID has expired")
	case err != nil:
		return skipped("%v", err)
	}
	leaf := st.Identities[0].Chain[0]
	left := leaf.NotAfter.Sub(x.now)
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life-left > life*lateRenewal/100 {
		return doubtful("see SP006 and SP011: it is renewed at half of its life", "%s ends in %s and was not renewed", st.Identities[0].ID, age(left))
	}
	return good("%s for %s more", st.Identities[0].ID, age(left))
}
