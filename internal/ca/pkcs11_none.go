//go:build !cgo

package ca

import (
	"context"
	"errors"

	"sallyport/internal/daemon"
)

func openPKCS11(context.Context, string) (keyStore, error) {
	return nil, daemon.Hint(errors.New("this issuer was built without PKCS#11"), "build it with make issuer-pkcs11, which needs a C compiler, or keep the keys in files")
}
