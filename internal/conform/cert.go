package conform

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport/internal/svid"
)

// leafMusts are the demands on the X.509-SVID of a workload.
var leafMusts = []int{15, 17, 19, 20, 23, 24, 26, 27, 28, 29}

// chain holds an X.509-SVID that the implementation made, with what it chains
// to, to what is demanded of them. want is the ID it was said to have, if any.
func (r *report) chain(what string, certs, roots []*x509.Certificate, want string) error {
	if len(certs) == 0 {
		err := errors.New("there is no certificate")
		r.say(what, err, leafMusts...)
		return err
	}
	leaf := certs[0]
	var faults []error
	say := func(must int, err error) {
		r.say(what, err, must)
		if err != nil {
			faults = append(faults, err)
		}
	}
	uris, err := svid.URINames(leaf)
	if err == nil && len(uris) != 1 {
		err = fmt.Errorf("it has %d URI names", len(uris))
	}
	say(17, err)
	if err == nil {
		r.name(uris[0])
		say(19, fails(hasPath(uris[0]), "its ID %s has no path", uris[0]))
		if want != "" {
			say(15, fails(uris[0] == want, "it is for %s, not for %s", uris[0], want))
		}
	}
	say(20, fails(len(leaf.Subject.Names) > 0 || critical(leaf, 17), "its subject is empty and its name is not critical"))
	say(23, fails(!leaf.IsCA, "it has cA"))
	say(24, keyUsage(leaf))
	say(26, fails(leaf.KeyUsage&x509.KeyUsageDigitalSignature != 0, "it lacks digitalSignature"))
	say(27, fails(leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) == 0, "it has keyCertSign or cRLSign"))
	both := slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	say(28, fails(both || len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0, "its extended key usage lacks serverAuth or clientAuth"))
	say(29, verify(certs, roots))
	for _, c := range slices.Concat(certs[1:], roots) {
		faults = append(faults, r.authority(c))
	}
	return errors.Join(faults...)
}

// authority holds a signing certificate to 21 and 23 to 25.
func (r *report) authority(c *x509.Certificate) error {
	what := "the signing certificate " + c.Subject.String()
	uris, err := svid.URINames(c)
	if err == nil && len(uris) > 1 {
		err = fmt.Errorf("it has %d URI names", len(uris))
	}
	if err == nil && len(uris) == 1 {
		err = fails(!hasPath(uris[0]), "its ID %s has a path", uris[0])
	}
	r.say(what, err, 21)
	ca := fails(c.BasicConstraintsValid && c.IsCA, "it lacks cA")
	r.say(what, ca, 23)
	usage := keyUsage(c)
	r.say(what, usage, 24)
	signs := fails(c.KeyUsage&x509.KeyUsageCertSign != 0, "it lacks keyCertSign")
	r.say(what, signs, 25)
	return errors.Join(err, ca, usage, signs)
}

func verify(certs, roots []*x509.Certificate) error {
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, c := range roots {
		o.Roots.AddCert(c)
	}
	for _, c := range certs[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err := certs[0].Verify(o)
	return err
}

// keyUsage is demand 24.
func keyUsage(c *x509.Certificate) error {
	if _, has := extension(c, 15); !has {
		return errors.New("it has no key usage")
	}
	return fails(critical(c, 15), "its key usage is not critical")
}

// extension finds one of those in id-ce (2.5.29).
func extension(c *x509.Certificate, last int) (pkix.Extension, bool) {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, last}) })
	if i < 0 {
		return pkix.Extension{}, false
	}
	return c.Extensions[i], true
}

func critical(c *x509.Certificate, last int) bool {
	e, has := extension(c, last)
	return has && e.Critical
}

// hasPath reports whether an ID has more than its trust domain.
func hasPath(id string) bool { return strings.Count(id, "/") > 2 }

// fails is an error unless ok.
func fails(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}
