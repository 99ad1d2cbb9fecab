package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"sallyport/internal/daemon"
)

// Config is the manual of the injector. It is read from one YAML file; the
// environment (SALLYPORT_IMAGE, ...) goes before the file.
type Config struct {
	// Listen is where Kubernetes asks, over TLS, such as "0.0.0.0:9443". Required.
	Listen netip.AddrPort `yaml:"listen"`
	// CertFile and KeyFile are the server's certificate for the name of its
	// Service, in PEM. They are read anew when they change. Required.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// Image is that of the sidecar, by digest in production. Required.
	Image string `yaml:"image"`
	// ConfigMap holds sidecar.yaml and bundle.pem, in each namespace that has
	// pods with sidecars. Default "sallyport-sidecar".
	ConfigMap string `yaml:"config_map"`
	// Audience is that of the token by which the pod is attested. Default
	// "spire-server".
	Audience string `yaml:"audience"`
	// User is what the sidecar runs as, and nothing else in the pod. Default 1337.
	User int64 `yaml:"user"`
	// OptOut are the namespaces in which a pod may say that it wants no sidecar, by
	// the annotation sallyport/inject: "false". Whoever may make a pod there gets
	// around policy by it. Default none: such a pod is refused.
	OptOut []string `yaml:"opt_out"`

	Log daemon.LogConfig `yaml:"log"`
}

// Validate reports all mistakes at once.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, field, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: missing; write %s", field, want))
		}
	}
	need(c.Listen.IsValid(), "listen", `where Kubernetes asks, such as "0.0.0.0:9443"`)
	need(c.CertFile != "", "cert_file", "the PEM file with the certificate for the name of the Service")
	need(c.KeyFile != "", "key_file", "the PEM file with its key")
	need(c.Image != "", "image", `the image of the sidecar, such as "registry.corp.example/sallyport@sha256:..."`)
	if strings.ContainsAny(c.Image, " \t") {
		errs = append(errs, fmt.Errorf("image: %q has a space in it", c.Image))
	}
	if c.User < 0 {
		errs = append(errs, fmt.Errorf("user: %d is negative; the sidecar needs a user that is not root, such as 1337", c.User))
	}
	errs = append(errs, c.Log.Validate())
	return errors.Join(errs...)
}

func (c *Config) fill() {
	if c.ConfigMap == "" {
		c.ConfigMap = "sallyport-sidecar"
	}
	if c.Audience == "" {
		c.Audience = "spire-server"
	}
	if c.User == 0 {
		c.User = 1337
	}
}
