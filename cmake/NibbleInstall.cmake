# Headers, an exported target and a version file: what find_package(nibble) needs.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(nibble_config_dir "${CMAKE_INSTALL_DATADIR}/cmake/nibble")

install(DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}/include/nibble" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.inl")
install(FILES "${CMAKE_CURRENT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
install(TARGETS nibble_headers EXPORT nibble_targets)
install(EXPORT nibble_targets NAMESPACE nibble:: FILE nibble-targets.cmake DESTINATION "${nibble_config_dir}")

configure_package_config_file("${CMAKE_CURRENT_SOURCE_DIR}/cmake/nibble-config.cmake.in"
                              "${CMAKE_CURRENT_BINARY_DIR}/nibble-config.cmake"
                              INSTALL_DESTINATION "${nibble_config_dir}")
# Before 1.0 a minor version may break; the package has no compiled code, so the architecture does not matter.
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/nibble-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/nibble-config.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/nibble-config-version.cmake" DESTINATION "${nibble_config_dir}")
