// The program stepca is step-ca without the clouds: what the end-to-end tests
// start as the authority above the issuer. It takes the file ca.json as step-ca
// does, and leaves out the key stores and services of the cloud providers,
// which are most of what step-ca takes to build.
package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"

	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/ca"
	_ "github.com/smallstep/certificates/cas/softcas"
	_ "go.step.sm/crypto/kms/softkms"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "stepca:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("want one argument, the file ca.json")
	}
	conf, err := config.LoadConfiguration(args[0])
	if err != nil {
		return err
	}
	srv, err := ca.New(conf, ca.WithConfigFile(args[0]))
	if err != nil {
		return err
	}
	go ca.StopReloaderHandler(srv)
	if err := srv.Run(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
