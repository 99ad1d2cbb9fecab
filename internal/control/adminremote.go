package control

import (
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc"

	"sallyport/internal/control/meshpb"
)

// remoteAdmin is the part of the Admin service that is there for callers from
// afar. The rest is absent, whatever its rights.
func remoteAdmin() *grpc.ServiceDesc {
	d := meshpb.Admin_ServiceDesc
	afar := func(name string) bool { return rights["/"+d.ServiceName+"/"+name]&toNamed != 0 }
	d.Methods = slices.DeleteFunc(slices.Clone(d.Methods), func(m grpc.MethodDesc) bool { return !afar(m.MethodName) })
	d.Streams = slices.DeleteFunc(slices.Clone(d.Streams), func(m grpc.StreamDesc) bool { return !afar(m.StreamName) })
	return &d
}

// DialAdminAt prepares an Admin for an issuer's port for proxies, under the
// identity of cfg: a workload whose rights rows of admin.csv say. It connects at
// the first call.
func DialAdminAt(cfg ClientConfig) (*Admin, error) {
	c, err := Dial(cfg)
	if err != nil {
		return nil, err
	}
	cert, err := cfg.Identity()
	if err != nil {
		return nil, fmt.Errorf("read SVID: %w", err)
	}
	l, err := c.open(cert)
	if err != nil {
		return nil, err
	}
	return &Admin{cc: l.cc, remote: func(text string) error {
		err := c.unreachable(l, text)
		if errors.Is(err, ErrMustReattest) {
			err = fmt.Errorf("%w: the issuer does not accept the SVID; mint a new one", ErrRefused)
		}
		return err
	}}, nil
}
