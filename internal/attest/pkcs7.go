package attest

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
)

// maxNodes bounds the parts of one BER document.
const maxNodes = 4096

var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
)

// digests are those that a signature may be over; SHA-1 is none of them.
var digests = []struct {
	oid, withRSA asn1.ObjectIdentifier
	hash         crypto.Hash
}{
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, crypto.SHA256},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 12}, crypto.SHA384},
	{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 13}, crypto.SHA512},
}

var oidRSA = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}

// A signedData is a CMS SignedData (RFC 5652) with one signer, taken apart.
// Nothing in it is true before verify.
type signedData struct {
	contentType asn1.ObjectIdentifier
	content     []byte // nil when it is elsewhere
	certs       []*x509.Certificate
	hash        crypto.Hash
	attrs       []byte // DER of the signed attributes as a SET, nil without
	sid         []byte // who signed, as the signer says
	sig         []byte
}

// elements gives what a constructed element of this class and tag holds.
func elements(b []byte, class, tag int) ([]asn1.RawValue, error) {
	var v asn1.RawValue
	if err := unmarshal(b, &v); err != nil || v.Class != class || v.Tag != tag || !v.IsCompound {
		return nil, errors.New("malformed SignedData")
	}
	var out []asn1.RawValue
	for rest := v.Bytes; len(rest) > 0; {
		var e asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &e); err != nil {
			return nil, errors.New("malformed SignedData")
		}
		out = append(out, e)
	}
	return out, nil
}

// sequence wants a SEQUENCE of at least n elements.
func sequence(b []byte, n int) ([]asn1.RawValue, error) {
	e, err := elements(b, asn1.ClassUniversal, asn1.TagSequence)
	if err == nil && len(e) < n {
		err = errors.New("malformed SignedData")
	}
	return e, err
}

// algorithm reads the OID of an algorithm without parameters.
func algorithm(b []byte) asn1.ObjectIdentifier {
	e, err := sequence(b, 1)
	if err != nil || len(e) > 2 || len(e) == 2 && !bytes.Equal(e[1].FullBytes, asn1.NullBytes) {
		return nil
	}
	return identifier(e[0].FullBytes)
}

func identifier(b []byte) asn1.ObjectIdentifier {
	var oid asn1.ObjectIdentifier
	if unmarshal(b, &oid) != nil {
		return nil
	}
	return oid
}

// within takes the field [tag] off the front, if it is there.
func within(e []asn1.RawValue, tag int) (field *asn1.RawValue, rest []asn1.RawValue) {
	if len(e) > 0 && e[0].Class == asn1.ClassContextSpecific && e[0].Tag == tag {
		return &e[0], e[1:]
	}
	return nil, e
}

// parseSignedData reads a SignedData in BER, which is what the clouds send.
func parseSignedData(ber []byte) (*signedData, error) {
	der, err := normalize(ber)
	if err != nil {
		return nil, err
	}
	outer, err := sequence(der, 2)
	if err != nil || len(outer) != 2 || !identifier(outer[0].FullBytes).Equal(oidSignedData) {
		return nil, errors.New("not a PKCS #7 SignedData")
	}
	sd, err := sequence(outer[1].Bytes, 4) // version, digests, content, ..., signers
	if err != nil {
		return nil, err
	}
	version := 0
	if err := unmarshal(sd[0].FullBytes, &version); err != nil || version != 1 && version != 3 {
		return nil, errors.New("SignedData of another version")
	}
	out := &signedData{}
	if err := out.readContent(sd[2].FullBytes); err != nil {
		return nil, err
	}
	certs, rest := within(sd[3:], 0)
	_, rest = within(rest, 1) // revocation lists
	if certs != nil {
		if out.certs, err = x509.ParseCertificates(certs.Bytes); err != nil || len(out.certs) > maxChain {
			return nil, errors.New("malformed or too many certificates")
		}
	}
	if len(rest) != 1 {
		return nil, errors.New("malformed SignedData")
	}
	signers, err := elements(rest[0].FullBytes, asn1.ClassUniversal, asn1.TagSet)
	if err != nil || len(signers) != 1 {
		return nil, errors.New("SignedData with none or several signers, want 1")
	}
	return out, out.readSigner(signers[0].FullBytes)
}

func (s *signedData) readContent(b []byte) error {
	e, err := sequence(b, 1)
	if err != nil {
		return err
	}
	s.contentType = identifier(e[0].FullBytes)
	field, rest := within(e[1:], 0)
	if s.contentType == nil || len(rest) > 0 {
		return errors.New("malformed SignedData")
	}
	if field == nil {
		return nil
	}
	if err := unmarshal(field.Bytes, &s.content); err != nil {
		return errors.New("content is no octet string")
	}
	if s.content == nil {
		s.content = []byte{}
	}
	return nil
}

// readSigner reads version, identifier, digest, [0] attributes, signature
// algorithm, signature, [1] unsigned attributes.
func (s *signedData) readSigner(b []byte) error {
	e, err := sequence(b, 5)
	if err != nil {
		return err
	}
	attrs, rest := within(e[3:], 0)
	if len(rest) < 2 {
		return errors.New("malformed SignedData")
	}
	if _, more := within(rest[2:], 1); len(more) > 0 || unmarshal(rest[1].FullBytes, &s.sig) != nil {
		return errors.New("malformed SignedData")
	}
	version := 0
	if err := unmarshal(e[0].FullBytes, &version); err != nil || version != 1 && version != 3 {
		return errors.New("signer of another version")
	}
	s.sid = e[1].FullBytes
	digest, by := algorithm(e[2].FullBytes), algorithm(rest[0].FullBytes)
	for _, d := range digests {
		if digest.Equal(d.oid) && (by.Equal(oidRSA) || by.Equal(d.withRSA)) {
			s.hash = d.hash
		}
	}
	if s.hash == 0 {
		return errors.New("signature is not RSA with SHA-256, SHA-384 or SHA-512")
	}
	if attrs != nil {
		s.attrs = bytes.Clone(attrs.FullBytes)
		s.attrs[0] = 0x31 // they are signed as a SET, not as the field they stand in
	}
	return nil
}

// verify checks the signature over content by the key of cert. Content inside
// must be the same.
func (s *signedData) verify(content []byte, cert *x509.Certificate) error {
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok || key.N.BitLen() < minRSA {
		return fmt.Errorf("the signer's key is not RSA of %d bits or more", minRSA)
	}
	if !s.signedBy(cert) {
		return errors.New("the signature is by another certificate")
	}
	if s.content != nil && !bytes.Equal(s.content, content) {
		return errors.New("the signature is over something else")
	}
	sum := s.sum(content)
	if s.attrs != nil {
		if err := s.checkAttrs(sum); err != nil {
			return err
		}
		sum = s.sum(s.attrs)
	}
	if rsa.VerifyPKCS1v15(key, s.hash, sum, s.sig) != nil {
		return errors.New("signature is wrong")
	}
	return nil
}

// signedBy compares the signer with issuer and serial number of a certificate,
// or with its key identifier.
func (s *signedData) signedBy(cert *x509.Certificate) bool {
	serial, err := asn1.Marshal(cert.SerialNumber)
	return err == nil && bytes.Equal(s.sid, encode(0x30, slices.Concat(cert.RawIssuer, serial))) ||
		len(cert.SubjectKeyId) > 0 && bytes.Equal(s.sid, encode(0x80, cert.SubjectKeyId))
}

func (s *signedData) sum(b []byte) []byte {
	h := s.hash.New()
	h.Write(b)
	return h.Sum(nil)
}

// checkAttrs wants the content's type and digest among the attributes, once.
func (s *signedData) checkAttrs(sum []byte) error {
	attrs, err := elements(s.attrs, asn1.ClassUniversal, asn1.TagSet)
	if err != nil {
		return err
	}
	var digest, kind int
	for _, a := range attrs {
		e, err := sequence(a.FullBytes, 2)
		if err != nil {
			return err
		}
		switch oid := identifier(e[0].FullBytes); {
		case oid.Equal(oidMessageDigest):
			var got []byte
			if digest++; unmarshal(e[1].Bytes, &got) != nil || !bytes.Equal(got, sum) {
				return errors.New("the signature is over something else")
			}
		case oid.Equal(oidContentType):
			var got asn1.ObjectIdentifier
			if kind++; unmarshal(e[1].Bytes, &got) != nil || !got.Equal(s.contentType) {
				return errors.New("the signature is over another type of content")
			}
		}
	}
	if digest != 1 || kind != 1 {
		return errors.New("attributes lack a digest or a type, or have two")
	}
	return nil
}

// unmarshal takes all of b or nothing.
func unmarshal(b []byte, v any) error {
	rest, err := asn1.Unmarshal(b, v)
	if err == nil && len(rest) > 0 {
		err = errors.New("bytes after the end")
	}
	return err
}

// normalize turns BER into DER as far as the clouds need: indefinite lengths
// and octet strings in parts.
func normalize(b []byte) ([]byte, error) {
	r := berReader{}
	out, rest, err := r.element(b, 0)
	if err == nil && len(rest) > 0 {
		err = errors.New("bytes after the end")
	}
	if err != nil {
		return nil, fmt.Errorf("malformed BER: %w", err)
	}
	return out, nil
}

type berReader struct{ nodes int }

// element reads one element and gives it in DER.
func (r *berReader) element(b []byte, depth int) (der, rest []byte, err error) {
	if r.nodes++; depth > 24 || r.nodes > maxNodes {
		return nil, nil, errors.New("too deep or too many parts")
	}
	if len(b) < 2 || b[0]&0x1f == 0x1f {
		return nil, nil, errors.New("bad tag")
	}
	tag, length, head, err := b[0], 0, 2, error(nil)
	indefinite := b[1] == 0x80
	switch {
	case b[1] < 0x80:
		length = int(b[1])
	case !indefinite:
		n := int(b[1] & 0x7f)
		if n > 3 || len(b) < 2+n {
			return nil, nil, errors.New("bad length")
		}
		for _, c := range b[2 : 2+n] {
			length = length<<8 | int(c)
		}
		head += n
	}
	if indefinite && tag&0x20 == 0 || len(b)-head < length {
		return nil, nil, errors.New("bad length")
	}
	if tag&0x20 == 0 {
		return encode(tag, b[head:head+length]), b[head+length:], nil
	}
	rest = b[head:]
	if !indefinite {
		rest = b[head : head+length]
	}
	var parts [][]byte
	for {
		if indefinite && len(rest) >= 2 && rest[0] == 0 && rest[1] == 0 {
			rest = rest[2:]
			break
		}
		if !indefinite && len(rest) == 0 {
			rest = b[head+length:]
			break
		}
		var part []byte
		if part, rest, err = r.element(rest, depth+1); err != nil {
			return nil, nil, err
		}
		parts = append(parts, part)
	}
	if tag != 0x24 { // not an octet string in parts
		return encode(tag, slices.Concat(parts...)), rest, nil
	}
	var whole []byte
	for _, p := range parts {
		var chunk []byte
		if err := unmarshal(p, &chunk); err != nil || p[0] != 0x04 {
			return nil, nil, errors.New("octet string of other parts")
		}
		whole = append(whole, chunk...)
	}
	return encode(0x04, whole), rest, nil
}

func encode(tag byte, content []byte) []byte {
	n := len(content)
	out := []byte{tag}
	switch {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 0x100:
		out = append(out, 0x81, byte(n))
	case n < 0x10000:
		out = append(out, 0x82, byte(n>>8), byte(n))
	default:
		out = append(out, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	return append(out, content...)
}
