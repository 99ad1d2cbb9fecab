//go:build cgo

package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/pkcs11"

	"sallyport/internal/daemon"
)

// tokenKeys keeps private keys in a PKCS#11 token, which makes them and never
// gives them away.
type tokenKeys struct {
	kms   *pkcs11.PKCS11
	label string
}

func openPKCS11(ctx context.Context, kms string) (keyStore, error) {
	t, err := parsePKCS11(kms)
	if err != nil {
		return nil, err
	}
	pin, err := t.readPIN()
	if err != nil {
		return nil, err
	}
	m, err := pkcs11.New(ctx, apiv1.Options{Type: apiv1.PKCS11, URI: t.uri, Pin: pin})
	if err != nil {
		return nil, tokenError(err, pin)
	}
	return &tokenKeys{kms: m, label: t.label}, nil
}

// tokenError says what a person can do about it.
func tokenError(err error, pin string) error {
	text := err.Error()
	for _, known := range []struct{ part, says, next string }{
		{"CKR_PIN_INCORRECT", "the token refused the PIN", "write its user PIN into the file that pin-source names; after a few wrong ones a token locks itself"},
		{"CKR_PIN_LEN_RANGE", "the token refused the PIN, which has a wrong length", "write its user PIN into the file that pin-source names"},
		{"CKR_PIN_LOCKED", "the PIN of the token is locked", "set a new user PIN with the PIN of the security officer"},
		{"could not find PKCS#11 token", "there is no such token", "check token, serial or slot-id against: pkcs11-tool --module MODULE --list-slots"},
		{"failed to open module", "the PKCS#11 module does not load", "check module-path"},
	} {
		if strings.Contains(text, known.part) {
			return daemon.Hint(errors.New(known.says), known.next)
		}
	}
	if strings.Contains(text, pin) {
		return errors.New("open token: an error that quotes the PIN")
	}
	return fmt.Errorf("open token: %w", err)
}

func (k *tokenKeys) labelOf(name string) string { return k.label + "-" + name }

// uri finds the key by label and ID, which is of the label's hash.
func (k *tokenKeys) uri(name string) string {
	label := k.labelOf(name)
	id := sha256.Sum256([]byte(label))
	return "pkcs11:id=" + hex.EncodeToString(id[:8]) + ";object=" + label
}

func (k *tokenKeys) where(name string) string {
	return "ca.kms: key " + k.labelOf(name) + " in the token"
}

func (k *tokenKeys) create(name string) (crypto.Signer, error) {
	_, err := k.kms.CreateKey(&apiv1.CreateKeyRequest{Name: k.uri(name), SignatureAlgorithm: apiv1.ECDSAWithSHA256})
	if errors.Is(err, apiv1.AlreadyExistsError{}) {
		return nil, daemon.Hint(fmt.Errorf("%s is there already", k.where(name)), "give each issuer a name of its own by object= in ca.kms")
	}
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", k.where(name), err)
	}
	return k.load(name)
}

func (k *tokenKeys) adopt(name string, _ crypto.Signer) error {
	return fmt.Errorf("%s cannot be imported: keys are made in the token", k.where(name))
}

func (k *tokenKeys) load(name string) (crypto.Signer, error) {
	found, err := k.has(name)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, daemon.Hint(fmt.Errorf("%s is missing", k.where(name)), "check token and object of ca.kms, or restore the token from a backup")
	}
	signer, err := k.kms.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: k.uri(name)})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", k.where(name), err)
	}
	return signer, nil
}

func (k *tokenKeys) has(name string) (bool, error) {
	_, err := k.kms.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: k.uri(name)})
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, apiv1.NotFoundError{}) || strings.HasSuffix(err.Error(), "not found"):
		return false, nil
	}
	return false, fmt.Errorf("find %s: %w", k.where(name), err)
}

func (k *tokenKeys) remove(name string) error { return k.kms.DeleteKey(k.uri(name)) }

func (k *tokenKeys) close() error { return k.kms.Close() }
